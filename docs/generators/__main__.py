"""Draw the README's chart again: ``python -m generators`` in the folder docs."""

from .charts import draw_for_readme

draw_for_readme()
