import math

import pytest

from charlm.metrics import Score, shown


def test_scores_add_as_sums_and_are_divided_once():
    total = Score(1.0, 1) + Score(1.0, 3)
    assert total.loss == 0.5  # the mean of the two means would be 2/3
    assert total.perplexity == pytest.approx(math.exp(0.5))
    assert total.bits_per_character == pytest.approx(0.5 / math.log(2))
    assert total.bits_per_byte(5) == pytest.approx(2 / math.log(2) / 5)


def test_uniform_guess_has_the_number_of_choices_as_perplexity():
    assert Score(10 * math.log(8), 10).perplexity == pytest.approx(8)
    assert Score(10 * math.log(8), 10).bits_per_character == pytest.approx(3)


def test_perplexity_overflows_to_infinity_and_an_empty_score_is_nan():
    assert Score(1e9, 1).perplexity == math.inf
    assert math.isnan(Score().loss)


@pytest.mark.parametrize(
    ("perplexity", "text"),
    [(4.5678, "4.57"), (9_999_999, "9999999.00"), (1.5e94, "1.50e+94"), (math.inf, "inf")],
)
def test_large_perplexities_are_shown_in_scientific_form(perplexity, text):
    assert shown(perplexity) == text
