"""What a GPU does with it: a model of a step's cost, checks of everything that runs there, and the figures.

`python -m loraplex.bench.gpu check` and `... bench` need torch, triton, transformers and PEFT, and install nothing.
"""
