"""A bundle seen from every side, as one self-contained page: `gather` runs it, `page` lays out what was found."""
