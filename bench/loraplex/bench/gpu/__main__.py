"""`python -m loraplex.bench.gpu check|bench`: exits 0 if all is right, 1 if not, 3 where there is no GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

NO_GPU = 3
MODEL = "llama-3.1-8b"


def main() -> int:
    """Run what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m loraplex.bench.gpu", description=__doc__)
    parser.add_argument("what", choices=("check", "bench"))
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:N; cpu tries everything at tiny sizes, interpreted"
    )
    parser.add_argument("--model", default=MODEL, help="whose shape the figures are for")
    parser.add_argument("--json", type=Path, default=Path("bench/results/gpu.json"), help="where figures go")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import torch

    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("there is no GPU here, or this torch is for CPUs only; nothing was checked or measured", file=sys.stderr)
        return NO_GPU
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    started = time.perf_counter()
    good = _check(device) if arguments.what == "check" else _bench(device, arguments.model, arguments.json)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if good else 1


def _check(device) -> bool:  # type: ignore[no-untyped-def]
    from loraplex.bench.gpu.checks import Check, run_checks, sizes
    from loraplex.bench.gpu.step_model import SHAPES, TINY

    def say(check: Check) -> None:
        sign = "ok    " if check.passed else "WRONG "
        print(f"{sign}{check.what}: {check.difference:.2e}, at most {check.allowed:.0e}", flush=True)

    short = device.type == "cpu"
    return run_checks(device, sizes(short, TINY[:1] if short else (*TINY, SHAPES["smollm2-135m"])), say)


def _bench(device, model: str, to: Path) -> bool:  # type: ignore[no-untyped-def]
    from loraplex.bench.charts import draw_gpu
    from loraplex.bench.gpu.document import gpu_document, table
    from loraplex.bench.gpu.figures import SHORT, BenchSize, measure_steps
    from loraplex.bench.gpu.many_adapters import measure_many
    from loraplex.bench.gpu.peft_step import peft_step_ms
    from loraplex.bench.gpu.step_model import SHAPES, TINY

    short = device.type == "cpu"
    size, shape = (SHORT, TINY[0]) if short else (BenchSize(), SHAPES[model])
    measured = measure_steps(shape, device, size)
    peft = peft_step_ms(shape, device, size.rows, size.context, size.peft_repeat)
    measured["peft_step_ms"] = peft
    measured["over_peft"] = peft / measured["steps_ms"]["32 adapters of rank 16"]
    measured |= measure_many(shape, device, size)
    document = gpu_document(shape, device, measured)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draw_gpu(document, to.with_suffix(".png"))
    print("\n".join(table(document)))
    return True


if __name__ == "__main__":
    sys.exit(main())
