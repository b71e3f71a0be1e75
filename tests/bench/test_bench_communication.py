"""The model of larger numbers of GPUs is that of the plan."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ppomax.engine.communication import USUAL
from ppomax.engine.layers import decoder_layers
from ppomax.engine.plan import reference_shape
from transformers import LlamaForCausalLM, LlamaForSequenceClassification


def test_its_models_are_those_of_the_reference_shape(bench: Callable[[str], Any]) -> None:
    shape = reference_shape()
    shape.num_labels = 1
    for auto, sizes in zip(
        (LlamaForCausalLM, LlamaForSequenceClassification), bench("bench_communication").seven_b(), strict=True
    ):
        with torch.device("meta"):
            model = auto(shape).bfloat16()
        layers = sum(p.nbytes for layer in decoder_layers(model) for p in layer.parameters())
        assert (sizes.layers, sizes.all) == (layers, sum(p.nbytes for p in model.parameters()))


def test_a_copy_in_each_machine_sends_gradients_alone_through_the_network(bench: Callable[[str], Any]) -> None:
    module = bench("bench_communication")
    policy, critic = module.seven_b()
    one, many = module.modelled(8, 8), module.modelled(64, 8)
    gradients = 2 * module.WORK.updates * (policy.all + critic.all)  # in float32
    summed = 2 * (7 / 8) * gradients / 8
    assert one["network_GB"] == 0
    assert many["network_GB"] == pytest.approx(summed / 1e9)
    assert many["sent_GB"] == pytest.approx(one["sent_GB"] + summed / 1e9)
    assert many["seconds"] >= many["network_GB"] * 1e9 / USUAL.network
    assert module.modelled(64, 64)["network_GB"] > many["network_GB"]
