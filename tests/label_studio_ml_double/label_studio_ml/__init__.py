"""A double of label-studio-ml 2.x, which is not on PyPI: what its server and base class do with a model, and no more.

How it behaves was read and seen in 2.0.1.dev0; `test_ml_base` runs the same tests on that where it is at hand.
"""
