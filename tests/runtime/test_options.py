"""What was given to `from_pretrained`, as it is understood on this machine."""

import pytest
import torch

from mixtral_offload.errors import OptionError
from mixtral_offload.runtime.options import parse_device


def test_cuda_without_a_number_is_the_current_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert parse_device("cuda") == torch.device("cuda", 1)
    assert parse_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(OptionError, match="no such device"):
        parse_device("cuda:2")
