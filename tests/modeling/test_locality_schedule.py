import math

import pytest

from localist_hf.modeling.locality_schedule import SCHEDULE_NAMES, schedule_lambdas


POLYNOMIALS = {"linear": 1, "quadratic": 2, "cubic": 3, "quartic": 4, "quintic": 5}


def test_the_seven_schedules_of_the_paper_the_upper_half_and_the_reverse_ones_have_names():
    assert set(SCHEDULE_NAMES) == {
        "distributed",
        "localist",
        "upper_half",
        *POLYNOMIALS,
        *(f"reverse_{name}" for name in POLYNOMIALS),
    }


@pytest.mark.parametrize(
    ("num_layers", "lambdas"), [(1, [1]), (2, [0, 1]), (5, [0, 0, 1, 1, 1]), (6, [0, 0, 0, 1, 1, 1])]
)
def test_the_upper_half_is_local_and_the_rest_free(num_layers: int, lambdas: list[int]):
    assert schedule_lambdas("upper_half", num_layers) == lambdas


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_a_reverse_schedule_runs_from_the_last_layer_to_the_first(name: str, num_layers: int):
    assert schedule_lambdas(f"reverse_{name}", num_layers) == schedule_lambdas(name, num_layers)[::-1]


@pytest.mark.parametrize(("name", "power"), POLYNOMIALS.items())
def test_polynomial_schedules_are_powers_of_relative_depth(name: str, power: int):
    lambdas = schedule_lambdas(name, 5)
    assert lambdas == pytest.approx([0.0, 0.25**power, 0.5**power, 0.75**power, 1.0])
    assert lambdas[0] == 0.0 and lambdas[-1] == 1.0


@pytest.mark.parametrize(("name", "value"), [("distributed", 0.0), ("localist", 1.0)])
@pytest.mark.parametrize("num_layers", [1, 2, 12])
def test_uniform_schedules_are_the_same_in_every_layer(name: str, value: float, num_layers: int):
    assert schedule_lambdas(name, num_layers) == [value] * num_layers


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_one_layer_is_fully_localised_under_every_polynomial(name: str):
    assert schedule_lambdas(name, 1) == [1.0]


@pytest.mark.parametrize("schedule", [[0.0, 0.3, 1.0], (0, 1, 0.5), [1, 1, 0]])
def test_an_explicit_list_is_taken_as_it_is(schedule):
    lambdas = schedule_lambdas(schedule, 3)
    assert lambdas == list(schedule)
    assert all(type(value) is float for value in lambdas)


@pytest.mark.parametrize("name", ["sextic", "reverse_localist", "reverse_"])
def test_an_unknown_name_is_refused_with_those_allowed(name: str):
    with pytest.raises(ValueError, match=f"`locality_schedule` is '{name}'") as error:
        schedule_lambdas(name, 4)
    assert all(repr(name) in str(error.value) for name in SCHEDULE_NAMES)


@pytest.mark.parametrize("length", [0, 3, 5])
def test_a_list_of_the_wrong_length_is_refused(length: int):
    with pytest.raises(ValueError, match=rf"list of {length} numbers.* 4 layers"):
        schedule_lambdas([0.5] * length, 4)


@pytest.mark.parametrize("value", [-0.001, 1.001, math.inf, -math.inf, math.nan])
def test_a_number_outside_0_to_1_is_refused_by_its_value(value: float):
    with pytest.raises(ValueError, match=rf"`locality_schedule` holds {value}; .*\[0, 1\]"):
        schedule_lambdas([0.0, value, 1.0], 3)
