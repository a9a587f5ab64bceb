"""A figure that a notebook shows by itself: nothing has to be imported or switched on for it."""

from io import BytesIO

import matplotlib.figure


class Figure(matplotlib.figure.Figure):
    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
