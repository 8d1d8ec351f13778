"""`petl_kernels.nn.PrefixAdapter` where several query heads share a key head, and called as PyTorch's attention is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from petl_kernels.nn import PrefixAdapter

HEADS, GROUPS, D_HEAD, L = 2, 3, 4, 5
D = HEADS * D_HEAD


def case(tokens=6, keys=7):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    module = PrefixAdapter(D, HEADS, L, groups=GROUPS, reparametrization=None, dtype=torch.float64)
    for p in module.parameters():
        p.data = draw(L, D)
    return module, draw(2, HEADS * GROUPS, tokens, D_HEAD), draw(2, HEADS, keys, D_HEAD), draw(2, HEADS, keys, D_HEAD)


def expected(module, query, key, value, seen):
    """Head by head: query head i reads key head i // GROUPS."""
    heads = []
    for i in range(HEADS * GROUPS):
        j, of = i // GROUPS, slice(i // GROUPS * D_HEAD, (i // GROUPS + 1) * D_HEAD)
        keys = torch.cat((module.key[:, of].expand(2, -1, -1), key[:, j]), 1)
        values = torch.cat((module.value[:, of].expand(2, -1, -1), value[:, j]), 1)
        scores = query[:, i] @ keys.mT / D_HEAD**0.5
        heads.append(scores.masked_fill(~F.pad(seen, (L, 0), value=True), -torch.inf).softmax(-1) @ values)
    return torch.stack(heads, 1)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_share_keys(repeated, masked):
    """Whether the caller repeats keys or leaves it to PyTorch; the gated form too."""
    module, query, key, value = case()
    seen = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else torch.ones(6, 7).bool()
    wanted = expected(module, query, key, value, seen)
    mask = seen if masked else None
    full = [t.repeat_interleave(GROUPS, 1) for t in (key, value)]
    got = module(query, *(full if repeated else (key, value)), mask, enable_gqa=not repeated)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    scores = (query @ full[0].mT / D_HEAD**0.5).masked_fill(~seen, -torch.inf)
    gated = module.gate(query, scores.softmax(-1).nan_to_num() @ full[1], scores.logsumexp(-1))
    torch.testing.assert_close(gated, wanted, rtol=1e-12, atol=1e-12)


def test_dropout_of_the_weights_is_that_of_pytorch():
    """Over prefix and keys together, and drawn by the caller's call, whatever the module's mode."""
    module, query, key, value = case()
    key, value = (t.repeat_interleave(GROUPS, 1) for t in (key, value))
    prefix = [p.repeat_interleave(GROUPS, 0).expand(2, -1, -1, -1) for p in module.keys_values()]
    torch.manual_seed(0)
    got = module.eval()(query, key, value, None, 0.5)
    torch.manual_seed(0)
    joined = (torch.cat(pair, 2) for pair in zip(prefix, (key, value)))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, *joined, None, 0.5))
    assert not torch.equal(got, module(query, key, value))


def test_is_a_module_of_its_groups():
    module, query, key, value = case()
    assert sum(p.numel() for p in module.parameters()) == 2 * L * D
    assert repr(module) == f"PrefixAdapter({D}, {HEADS}, {L}, reparametrization=None, groups={GROUPS})"
    network = PrefixAdapter(D, HEADS, L, groups=GROUPS, reparametrization=3, dtype=torch.float64)
    plain = network.materialize()
    args = (query, key, value, None, 0.0, True)
    assert torch.equal(plain(*args, enable_gqa=True), network(*args, enable_gqa=True))
    with pytest.raises(ValueError, match=r"key must be .* = \[2, 6, \*, 4\], got \[2, 2, 7, 4\]"):
        module(query, key, value)
    with pytest.raises(ValueError, match=r"query must be .* = \[\*, 6, \*, 4\], got \[2, 2, 7, 4\]"):
        module(key, key, value, enable_gqa=True)
    with pytest.raises(ValueError, match="groups must be an integer of at least 1, got 0"):
        PrefixAdapter(D, HEADS, L, groups=0)
