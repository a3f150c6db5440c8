"""Options that refer to others are known by their text; all else may stand anywhere."""

import pytest

from rlmed.data.options.order import keeps_order, kept_order_text, kept_orders, names_letters, refers_to_others

REFERRING = """
A and C; Both A and B; A, B; A, B and C; A, C, and D; (A) and (B); A & B; A/B; A+B; a or b
Neither A nor B; Only A; A only; Options A and B; A and B are correct; Both (a) and (c); A through D
A–C; All of A, B and C; Both 'A' and 'B'; Option A; All except B; all of the above except B
all of the above; All of the above.; All the above; none of the above; None of the above is correct
any of the above; two of the above; more than one of the above; none of the listed
All of the above findings; None of the options; all options; No option is correct
Both options are correct; none of the other options; none of these; all of these; either of these
none of them; both of these findings; both; Both; neither; either; all; none; all are correct
both are true; none apply; neither is correct; alle; beide; beides; keine; keines davon
alle der oben genannten; Keine der genannten; Alle genannten; A und C; sowohl A als auch B
weder A noch B; todas las anteriores; ninguna de las anteriores; ambas
toutes les réponses ci-dessus; aucune de ces réponses; les deux; A et C; tutte le precedenti; 以上都是
Everything above; nothing of the above; all three; all of the three; all statements are true; A plus C
A as well as B; nichts davon; tout ce qui précède; todo lo anterior; ambas son correctas; alle bovenstaande
alla ovanstående; все перечисленное; すべて; 都对; 両方
以上皆非; 以上都不是; 上述都对; 两者都有; 都是; A和B; A、B; 上記のすべて
"""
FREE = """
liver; A; B; hepatitis A; E. coli; vitamin A and E; Stanford A and B; A-mode; C-arm; AB; T1 and T2
1 and 2; left and right; yes; no; both lungs; both kidneys; either lung; neither lung; all lobes
all sinuses; none visible; no abnormality; no previous surgery; one lesion; above the diaphragm
below the knee; both above and below the diaphragm; all above the diaphragm; the first rib
all four chambers; everything normal; nothing abnormal; all 3 lobes; all five ribs; другое
another finding; beide Lungen; alle Lappen; keine Auffälligkeit; tous les lobes du foie
todo el pulmón; 都市; 肝
"""


def entries(text: str) -> list[str]:
    return [entry.strip() for line in text.strip().splitlines() for entry in line.split(";")]


@pytest.mark.parametrize("option", entries(REFERRING))
def test_an_option_that_refers_to_others(option):
    assert refers_to_others(option)
    assert keeps_order(("liver", option))


@pytest.mark.parametrize("option", entries(FREE))
def test_an_option_that_stands_for_itself(option):
    assert not refers_to_others(option)


def test_those_that_name_letters():
    assert [names_letters(text) for text in ("A and C", "only (b)", "all except B")] == [True] * 3
    assert [names_letters(text) for text in ("all of the above", "both", "liver", "A", "none")] == [False] * 5


def test_the_option_that_is_shown_is_the_rows_own():
    rows = [("liver", "spleen"), ("left", "right", "neither of these"), ("A and B", "x", "y")]
    assert kept_orders(rows) == (2, "neither of these")
    assert kept_order_text(2, 3, "neither of these").endswith("refers to others, such as 'neither of these'")
    assert kept_orders(rows[:1]) == (0, "")
    assert kept_order_text(2, 3, "").endswith("since one refers to others")
    assert len(kept_order_text(1, 1, "none of the options " * 100)) < 300
