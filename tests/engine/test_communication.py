"""What travels between GPUs, by hand; `bench/bench_communication.py` holds the payloads against a real run."""

import pytest
from ppomax.engine.communication import Machines, Payload, Sizes, Traffic, payloads, traffic

POLICY, CRITIC = Sizes(layers=80, rest=20, reduced=2.0), Sizes(layers=80, rest=10, reduced=2.0)
WHOLE = Payload(gathered=600.0, reduced=200.0)


def test_weights_travel_for_each_pass_and_gradients_once() -> None:
    found = payloads({"policy": POLICY, "critic": CRITIC}, {"policy": 3, "critic": 4}, {"policy": 5, "critic": 6})
    assert found == {
        "rollout": Payload(100),
        "score": Payload(3 * 100 + 4 * 90),
        "update policy": Payload(5 * (100 + 80), 5 * 200),
        "update critic": Payload(6 * (90 + 80), 6 * 180),
    }


@pytest.mark.parametrize(
    ("gpus", "shards", "received", "inside", "network"),
    [
        pytest.param(1, 1, 0, 0, 0, id="one"),
        pytest.param(8, 8, 700, 700, 0, id="a machine"),
        pytest.param(8, 4, 600 + 50, 600 + 50, 0, id="two copies in a machine"),
        pytest.param(16, 8, 700 + 25, 700, 25, id="a copy a machine: gradients alone travel farther"),
        pytest.param(16, 4, 600 + 75, 600 + 75, 75 / 2, id="two copies a machine share its adapters"),
        pytest.param(16, 16, 750, 750, 400 / 8, id="half of it comes in, by eight adapters"),
        pytest.param(12, 12, 800 * 11 / 12, 800 * 11 / 12, 800 * 8 / 12 / 4, id="four GPUs in the second machine"),
        pytest.param(12, 6, 800 * 5 / 6 + 200 / 6, 800 * 5 / 6 + 0, 800 * 4 / 6 / 2 + 200 / 6, id="across machines"),
    ],
)
def test_what_comes_to_a_gpu(gpus: int, shards: int, received: float, inside: float, network: float) -> None:
    assert traffic(WHOLE, gpus, shards, Machines(8)) == pytest.approx((received, inside, network))


def test_the_slower_link_takes_the_time() -> None:
    assert Traffic(900, inside=900, network=50).seconds(link=450, network=50) == 2
    assert Traffic(900, inside=900, network=150).seconds(link=450, network=50) == 3
