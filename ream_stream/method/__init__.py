"""The method itself: tensors and numbers in, tensors and numbers out.

Nothing here reads a file, knows a model family or keeps state between calls.
docs/concepts/method.md has the equations; each module says which of them it computes.
"""
