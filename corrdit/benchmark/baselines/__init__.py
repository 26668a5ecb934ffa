"""Other ways to compute the same operations, as a user of plain PyTorch would: what the library is timed against.

Every module says whose way it is. All functions take q, k `[B, H, N, D]` of the video tokens alone, in the order of
`TokenGrid`, and leave their backward pass to autograd unless they say otherwise.
"""
