"""All parameters as one vector."""

import pytest
import torch

from training.flat import ALIGN, FlatParameters


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_modules_notice_nothing_and_one_step_moves_them_all(layout):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.SiLU(), torch.nn.Conv2d(5, 2, 3)).to(
        memory_format=layout
    )
    twin = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.SiLU(), torch.nn.Conv2d(5, 2, 3)).to(
        memory_format=layout
    )
    twin.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 8, 8)
    flat = FlatParameters(list(net.parameters()))
    assert torch.equal(net(x), twin(x)) and all(start % ALIGN == 0 for start in flat.starts)
    one, many = torch.optim.RAdam([flat.vector], lr=0.1), torch.optim.RAdam(twin.parameters(), lr=0.1)
    for _ in range(8):
        flat.gradient.zero_()
        many.zero_grad()
        for model, optimizer in ((net, one), (twin, many)):
            model(x).square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6) and ours.stride() == theirs.stride()
    moments = flat.split(one.state[flat.vector]["exp_avg"])
    for moment, parameter in zip(moments, twin.parameters(), strict=True):
        assert torch.allclose(moment, many.state[parameter]["exp_avg"], atol=1e-5) and moment.is_contiguous()
    assert torch.equal(flat.join(moments), one.state[flat.vector]["exp_avg"])
