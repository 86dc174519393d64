from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def _nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of every plot that a test of the report draws lies within the picture."""
    save = Figure.savefig

    def checked(figure: Figure, *args: Any, **how: Any) -> None:
        save(figure, *args, **how)
        # In inches.
        drawn, picture = figure.get_tightbbox(), figure.bbox_inches.padded(0.05)
        assert picture.contains(drawn.x0, drawn.y0), (drawn, picture)
        assert picture.contains(drawn.x1, drawn.y1), (drawn, picture)

    monkeypatch.setattr(Figure, "savefig", checked)
