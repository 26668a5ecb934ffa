"""What reading, perturbing and editing a transformer have in common.

How its attention is seen, its forwards watched and replaced, its steps and samples counted. A model is as it was when
the blocks of this folder end.
"""
