"""One codec between messages and bytes, and the ways on which these bytes travel."""
