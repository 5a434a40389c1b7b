"""Measurements of fragfs beside other tools on one machine: `make bench`."""
