"""How data sets are made: slicing, checking, packing, showing, the phantom. The commands of data.py."""
