import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.config.arch import DENSE, LETTERS, StageSpec, parse, render

GOOD = "l1,h3,d96,n1,s1,g1,p4,f7,a0_l2,h3,d192,n2,s1,g1,p2,f7,a1_l3,h6,d384,n8,s0,g1,p2,f7,a1"
# A string, the character it is wrong at, what is marked there, and what is said.
BAD = [
    ("", 1, "", "1 stages, where 3 or 4 are allowed"),
    ("l1_l2", 1, "l1_l2", "2 stages"),
    ("l1_l2_l3_l4_l5", 1, "l1_l2_l3_l4_l5", "5 stages"),
    ("l1,x3_l2_l3", 4, "x3", "'x' is none of the letters"),
    ("l1_l2,H3_l3", 7, "H3", "'H' is none of the letters"),
    ("l1, h3_l2_l3", 4, " h3", "' ' is none of the letters"),
    ("l1,_l2_l3", 4, "", "'' is none of the letters"),
    ("l1,,h3_l2_l3", 4, "", "'' is none of the letters"),
    ("l1__l3", 4, "", "'' is none of the letters"),
    ("l1,h3,h4_l2_l3", 7, "h4", "'h' stands twice"),
    ("l1_l2,h_l3", 7, "h", "'h' (heads) needs a whole number"),
    ("l1_l2_l3,d9x", 10, "d9x", "'d' (dim) needs a whole number"),
    ("l1_l2_l3,d-9", 10, "d-9", "'d' (dim) needs a whole number"),
    ("l1_l2_l3,d1.5", 10, "d1.5", "'d' (dim) needs a whole number"),
    ("l1_l2_l3,d٣", 10, "d٣", "'d' (dim) needs a whole number"),
    ("l1_l2_l3,s2", 10, "s2", "'s' is 0 or 1"),
    ("l1_l2_l3,a3", 10, "a3", "'a' is 0 or 1"),
    ("l1,n0_l2_l3", 4, "n0", "'n' (blocks) must be positive"),
    ("l1,p0_l2_l3", 4, "p0", "'p' (patch size) must be positive"),
    ("l1_l3_l2", 4, "l3", "stage 2 was expected here"),
    ("l2_l2_l3", 1, "l2", "stage 1 was expected here"),
    ("l1_l2,h5,d96_l3", 4, "l2,h5,d96", "d96 is no multiple of h5"),
    ("l1_l2_l3,h3,d9", 7, "l3,h3,d9", "absolute positions need an even d, got d9"),
]
sizes = st.integers(1, 9)


@st.composite
def stages(draw):
    made = []
    for number in range(1, draw(st.sampled_from([3, 4])) + 1):
        heads = draw(sizes)
        made.append(
            StageSpec(
                number=number,
                heads=heads,
                dim=2 * heads * draw(sizes),
                blocks=draw(sizes),
                attention=draw(st.sampled_from(["longformer", "srformer", DENSE])),
                num_global=draw(st.integers(0, 300)),
                patch=draw(sizes),
                feature=draw(st.integers(1, 300)),
                absolute=draw(st.booleans()),
            )
        )
    return tuple(made)


@pytest.mark.parametrize(("arch", "character", "marked", "message"), BAD)
def test_errors_point_at_the_character(arch, character, marked, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse(arch)
    text = str(caught.value)
    assert text.startswith(f"ARCH, character {character}: ")
    assert f">>>{marked}<<<" in text
    assert arch[character - 1 :].startswith(marked)
    # Taking the marks out leaves the string that was given.
    shown = text[text.rindex(", at ") + len(", at ") :][1:-1]
    assert shown.replace(">>>", "").replace("<<<", "") == arch
    assert "\n" not in text


def test_an_unknown_letter_lists_the_known():
    with pytest.raises(ValueError, match="none of the letters") as caught:
        parse("l1,x3_l2_l3")
    assert all(f"{letter} ({meaning})" in str(caught.value) for letter, meaning in LETTERS.items())


def test_all_letters():
    first, second, third = parse(GOOD, "srformer")
    assert first == StageSpec(
        number=1,
        heads=3,
        dim=96,
        blocks=1,
        attention="srformer",
        num_global=1,
        patch=4,
        feature=7,
        absolute=False,
    )
    assert first.position == "relative"
    assert (second.attention, second.blocks, second.position) == ("srformer", 2, "absolute")
    assert (third.attention, third.heads, third.dim) == ("full", 6, 384)


def test_defaults():
    for stage in parse("l1_l2_l3"):
        assert (stage.heads, stage.dim, stage.blocks, stage.num_global) == (3, 192, 1, 1)
        assert (stage.patch, stage.feature, stage.absolute) == (2, 7, True)
        assert stage.attention == "longformer"


def test_letters_in_any_order_and_leading_zeros():
    assert parse("d096,h3,l1_l2_l3") == parse("l1,h3,d96_l2_l3")


def test_a_mechanism_for_each_stage():
    mix = ["longformer", "srformer", "performer"]
    assert [stage.attention for stage in parse("l1_l2,s0_l3", mix)] == [
        "longformer",
        "full",
        "performer",
    ]
    with pytest.raises(ValueError, match=r"3 mechanisms \(longformer, srformer, performer\) for 4"):
        parse("l1_l2_l3_l4", mix)


def test_one_stage_does_not_leak_into_the_next():
    first, second, third = parse("l1,h1,d8,n5,s0,g9,p4,f3,a0_l2_l3")
    assert first.num_global == 9
    assert second == StageSpec(**(vars(third) | {"number": 2}))


@given(stages())
def test_render_is_the_inverse_of_parse(made):
    arch = render(made)
    assert parse(arch, [stage.attention for stage in made]) == made
    assert render(parse(arch, "longformer")) == arch


def parsed(text):
    try:
        return parse(text), ""
    except ValueError as error:
        return None, str(error)


@given(st.text("l1234,_hdnsgpfa0 x", max_size=40))
def test_any_text_is_parsed_or_refused_by_one_line(text):
    made, message = parsed(text)
    if made:
        assert parse(render(made)) == made
    else:
        assert message.startswith("ARCH, character ")
        assert "\n" not in message
