"""Fills the generated parts of docs/PERFORMANCE.md and README.md from the documents that the bench commands wrote.

A part begins with `<!-- generated: NAME -->` and ends with `<!-- end -->`. What was not measured leaves its part alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraplex.bench.gpu.targets import TARGETS

Documents = Mapping[str, Any]
"""What the commands wrote, by the file's name without its ending."""


class PageError(ValueError):
    """The page has no part of a name that is to be filled."""


Parts = Mapping[str, tuple[Sequence[str], Callable[[Documents], str]]]
"""A page's parts: which documents each needs, and what makes it."""


def fill(page: str, documents: Documents, parts: Parts) -> str:
    """Return `page` with every part of `parts` replaced for which `documents` has what it needs.

    Raises:
        PageError: if the page lacks a part.
    """
    for name, (needed, make) in parts.items():
        if all(key in documents for key in needed):
            page = _replace(page, name, make(documents))
    return page


def targets(documents: Documents) -> str:
    """Return issue 4's table with what was measured beside it."""
    cpu = documents["cpu"]
    peers = {entry["system"]: entry for entry in documents.get("peers", [])}
    adds = cpu["lora_adds_ms"]
    over = {name: _over_budget(cpu, name) for name in cpu["rss_mb"]}
    rows = [
        (
            "mixed, 16 adapters of ranks 8 to 64",
            _peer(peers, "mixed_tok_s", case="mixed"),
            ">= 470 tok/s",
            cpu["mixed_tok_s"],
        ),
        ("base only", _peer(peers, "base_tok_s"), ">= 600 tok/s int8, >= 420 NF4", cpu["base_tok_s"]),
        ("LoRA in a 16-row step, ranks 8 to 64", "", "<= 10 ms", {n: adds[n]["mixed"] for n in adds}),
        ("LoRA in a 16-row step, rank 8", "", "<= 3 ms", {n: adds[n]["mixed_r8"] for n in adds}),
        ("mixed over base", "", "75 %", _percent(cpu["of_base"]["mixed_tok_s"])),
        ("mixed of rank 8 over base", "", "90 %", _percent(cpu["of_base"]["mixed_r8_tok_s"])),
        (
            "one stream, one adapter",
            _peer(peers, "one_stream_tok_s", case="one_stream"),
            ">= 100 tok/s",
            cpu["one_stream_tok_s"],
        ),
        ("64 requests over 64 adapters of rank 8", "", ">= 800 tok/s", cpu["rows64_r8_tok_s"]),
        (
            "first token, 512-token prompt, idle",
            _peer(peers, "ttft_512_ms", min),
            "ahead of llama.cpp and OpenVINO, ms",
            cpu["ttft_512_ms"],
        ),
        ("start to ready, demo model", _peer(peers, "ready_s", min), "<= 6 s", cpu["ready_s"]),
        ("memory beside weights and budgets", "", "<= 600 MB (NF4)", over),
    ]
    names = list(cpu["base_tok_s"])
    header = ["what", "best correct peer", "target", *names]
    table = _table(
        header, [[what, peer, target, *(_text(found[n]) for n in names)] for what, peer, target, found in rows]
    )
    return f"{_origin('make bench-cpu', cpu)}\n\n{table}"


def peers_part(documents: Documents) -> str:
    """Return the comparison, wrong answers marked, and what is missing with the reason."""
    header = ["system", "base tok/s", "mixed tok/s", "one stream tok/s", "first token ms", "ready s", "answers", "how"]
    keys = ("base_tok_s", "mixed_tok_s", "one_stream_tok_s", "ttft_512_ms", "ready_s")
    answers = {True: "right", False: "**wrong**", None: "not judged"}
    rows, missing = [], []
    for entry in documents["peers"]:
        if any(entry[key] is not None for key in keys):
            how = f"{entry['version']}; {entry['way']}"
            rows.append([entry["system"], *(_text(entry[key]) for key in keys), answers[entry["correct"]], how])
        if entry["reason"]:
            missing.append(f"- {entry['system']}: {entry['reason'].splitlines()[0]}")
    chart = "![Output tokens per second of every system](images/peers.png)"
    return "\n\n".join([chart, _table(header, rows), *(["\n".join(missing)] if missing else [])])


def readme_chart(documents: Documents) -> str:
    """Return the chart of all systems, and the command that draws it."""
    machine = documents["peers-machine"]
    chart = "![Output tokens per second of every system, answers judged by PEFT](docs/images/peers.png)"
    return f"{chart}\n\n{_origin('make bench-peers', machine)}"


def quality_part(documents: Documents) -> str:
    """Return perplexities and divergences."""
    quality = documents["quality"]
    header = ["weights", "cache and embedding", "perplexity", "of float32", "mean KL, nats", "same first choice"]
    rows = [
        [
            each["name"],
            each["dtype"],
            f"{each['perplexity']:.3f}",
            f"{each['of_exact']:.4f}",
            f"{each['kl']:.2e}",
            f"{each['same_choice']:.1%}",
        ]
        for each in quality["qualities"]
    ]
    origin = _origin("loraplex bench quality", quality)
    return f"{origin} {quality['tokens']} tokens of {quality['text']}.\n\n{_table(header, rows)}"


def roofline_part(documents: Documents) -> str:
    """Return the machine's rates and what they allow."""
    roofline = documents["roofline"]
    rates = [["reading memory", f"{roofline['read_gb_s']} GB/s"]]
    rates += [[f"{name} products", f"{rate} GFLOP/s"] for name, rate in roofline["product_gflop_s"].items()]
    bounds = [[f"a W16 step, {name}", f"{ms} ms at least"] for name, ms in roofline["step_bounds_ms"].items()]
    origin = _origin("loraplex bench roofline", roofline)
    table = _table(["what", f"with {roofline['threads']} threads"], rates + bounds)
    return f"{origin}\n\n{table}"


def growth_part(documents: Documents) -> str:
    """Return the sweeps, a line each."""
    growth = documents["growth"]
    rows = []
    for sweep in growth["sweeps"].values():
        points = sweep["points"]
        rate = ", ".join(f"{point['x']}: {point['tok_s']:.0f}" for point in points)
        step = ", ".join(f"{point['x']}: {point['step_ms']:.1f}" for point in points if point["step_ms"])
        rows.append([sweep["x"], sweep["what"], rate, step])
    origin = _origin("loraplex bench growth", growth)
    chart = "![Tokens per second and step time against rows, adapters, rank and context](images/growth.png)"
    return f"{chart}\n\n{origin} Held as {growth['quantization']}.\n\n" + _table(
        ["grows", "with", "tok/s", "decode step, ms"], rows
    )


def gpu_model_part(documents: Documents) -> str:
    """Return what the model says of steps on a GPU; nothing of it is measured."""
    model = documents["gpu-model"]
    header = ["step", "weights", "keys and values", "adapters", "launches", "at least", "with launches"]
    rows = [
        [
            name,
            *(f"{step[key] / 1e9:.2f} GB" for key in ("weight_bytes", "cache_bytes", "adapter_bytes")),
            str(step["launches"]),
            *(f"{step[key]:.2f} ms" for key in ("bound_ms", "modelled_ms")),
        ]
        for name, step in model["steps"].items()
    ]
    where = f"{model['model']} on {model['card']}, {model['bandwidth_tb_s']} TB/s"
    return f"**Modelled, not measured**: {where} (90 % of what the {model['source']} says).\n\n{_table(header, rows)}"


def gpu_part(documents: Documents) -> str:
    """Return the GPU's targets with what was measured, and what the model says for that card."""
    gpu = documents["gpu"]
    rows = []
    for target in TARGETS:
        modelled = "-" if target.modelled is None else f"{target.modelled(gpu['modelled']['steps']):.2f}"
        rows.append([target.what, target.text, modelled, f"{gpu[target.key]:.2f}{target.unit}"])
    origin = f"`{gpu['command']}` at {gpu['commit'] or 'an unknown commit'} on {gpu['device']}, {gpu['model']}"
    note = f"The NF4 product is {gpu['nf4_product']}."
    chart = "![Decode steps on a GPU, measured and modelled](images/gpu.png)"
    return f"{chart}\n\n{origin}. {note}\n\n{_table(['what', 'target', 'modelled', 'measured'], rows)}"


PERFORMANCE_PARTS: Parts = {
    "targets": (["cpu"], targets),
    "peers": (["peers"], peers_part),
    "roofline": (["roofline"], roofline_part),
    "growth": (["growth"], growth_part),
    "quality": (["quality"], quality_part),
    "gpu-model": (["gpu-model"], gpu_model_part),
    "gpu": (["gpu"], gpu_part),
}
README_PARTS: Parts = {"chart": (["peers", "peers-machine"], readme_chart)}


def _replace(page: str, name: str, text: str) -> str:
    pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise PageError(f"the page has no part `<!-- generated: {name} -->` ... `<!-- end -->`")
    return pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page, count=1)


def _origin(command: str, document: Mapping[str, Any]) -> str:
    """Return which command measured, where and at which commit."""
    machine = document["machine"]
    where = f"{machine['usable_cpus']} cores of {machine['cpu_model']} ({', '.join(machine['cpu_capabilities'])})"
    return f"`{command}` at {document['commit'] or 'an unknown commit'} on {where}."


def _peer(peers: Mapping[str, Mapping[str, Any]], key: str, best: Callable[..., Any] = max, case: str = "base") -> str:
    """Return the best figure among the other systems that answered `case` rightly, and whose it is."""
    others = {name: entry for name, entry in peers.items() if not entry["ours"] and case in entry["judged"]}
    found = [(each[key], name) for name, each in others.items() if each["judged"][case]["correct"] and each[key]]
    if not found:
        return ""
    value, name = best(found)
    return f"{_text(value)} ({name})"


def _percent(shares: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{share:.0%}" for name, share in shares.items()}


def _over_budget(cpu: Mapping[str, Any], name: str) -> float:
    """Return MB beside weights and the budgets of KV cache and adapters."""
    beside: float = cpu["rss_mb"][name] - sum(cpu["budgets_mb"][name].values())
    return round(beside, 1)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
