"""Operations on the queries and keys of joint video attention.

Queries and keys are `[batch, heads, tokens, head_dim]` after normalisation and rotary embedding, text tokens included,
in the order of the model; a `corrdit.TokenGrid` says which token is which. Statistics and sums are float32 for half
and single precision and float64 for float64 input.

Every operation takes `backend`: "reference" materialises score maps and is the definition, "streaming" visits query
rows in chunks under a memory budget on any device, "triton" runs fused kernels on a CUDA device, and "auto" takes
"triton" for CUDA tensors and "streaming" for all others. Without a `memory_budget` the streaming backend takes 256 MiB
beyond inputs and outputs, more only where the keys of one frame alone exceed them; a given budget is kept, or refused
where it is too small. A caller compiled by `torch.compile(fullgraph=True)` stays one graph on "triton" and "reference"
("streaming" breaks graphs); values that a tensor holds (`head_weights`, `center`, `tokens`) are not checked in one.
Autocast changes no result.

Every operation also takes a part of the tokens: `queries=(start, stop)`, a flat range of the F * h * w video tokens, or
`query_frames`, frames in the order in which q holds them; `keys=(start, stop)`, a range that k (and v) hold, a shard.
The tensors then hold those video tokens alone, or those with the text at its end of the axis as in the whole. Queries
are rows of the whole result, keys outside a shard are as if removed by `key_mask`, which covers the tokens of k, or the
whole axis. k and v may have fewer heads than q: query head i reads key head `i // (H // Hk)`. Results of shards are
merged by `merge` from the log-sum-exp that `return_lse=True` gives.

Heads whose entry of `head_weights` is 0 are neither read nor multiplied, nor does a NaN in one count; heads that are
not evenly spaced are copied. Where values cannot be looked at (a tensor of weights in a compiled or captured caller)
they are multiplied by 0.

The kernels multiply float32 exactly; within `corrdit.kernels.float32_precision("tf32")` they take tensor cores and ten
bits. The last two products of the gradient of averaged logits, means over heads (`heads="features"`) and weighted means
of probabilities are PyTorch's and follow PyTorch's own setting.
"""

from corrdit.ops.attention_mass import AttentionMass, attention_mass
from corrdit.ops.cost_rows import cost_rows
from corrdit.ops.displacement import hard_displacement, soft_displacement
from corrdit.ops.frame_local_attention import frame_local_attention
from corrdit.ops.match import Match, match
from corrdit.ops.merge import merge

__all__ = [
    "AttentionMass",
    "Match",
    "attention_mass",
    "cost_rows",
    "frame_local_attention",
    "hard_displacement",
    "match",
    "merge",
    "soft_displacement",
]
