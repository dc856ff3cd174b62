"""A data set to look at: `write_page` makes one HTML page with clips to see and hear, of those that `selection` finds;
`contact_sheet` a PNG.
"""

from cmacc.shards.page.html import selection, write_page
from cmacc.shards.page.sheet import contact_sheet

__all__ = ["contact_sheet", "selection", "write_page"]
