"""The named locality configurations."""

import pytest

from localist_hf import LocalistGPT2Config
from localist_hf.configuration import BASELINE_VARIANT, PAPER_VARIANTS, VARIANTS, variant_config, variant_name


def test_the_seven_of_the_paper_its_baseline_its_reverse_and_the_upper_half() -> None:
    assert list(VARIANTS) == [
        "distributed", "linear", "quadratic", "cubic", "quartic", "quintic", "localist", "upper_half",
        "window", "reverse_quintic",
    ]  # fmt: skip
    assert [*PAPER_VARIANTS, "upper_half", "window", "reverse_quintic"] == list(VARIANTS)
    assert BASELINE_VARIANT in VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_valid_configuration(variant: str) -> None:
    config = LocalistGPT2Config(n_layer=12, **variant_config(variant))
    if variant in ("distributed", "localist"):
        assert set(config.locality_lambdas) == {float(variant == "localist")}
    else:
        rising = config.locality_lambdas[:: -1 if variant == "reverse_quintic" else 1]
        assert (rising[0], rising[-1]) == (0, 1)
        assert rising == sorted(rising)
    assert config.block_partition == ("window" if variant == "window" else "semantic")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_tells_its_variant(variant: str) -> None:
    assert variant_name(LocalistGPT2Config(num_sink_tokens=4, **variant_config(variant))) == variant
    assert variant_name(LocalistGPT2Config(n_layer=2, locality_schedule=[0.0, 1.0])) is None


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`variant` is 'sextic'; allowed are 'distributed', 'linear'"):
        variant_config("sextic")


def test_changing_the_result_changes_no_recipe() -> None:
    variant_config("linear")["locality_schedule"] = "localist"
    assert VARIANTS["linear"] == {"locality_schedule": "linear"}
