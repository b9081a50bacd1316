"""`remend bench`: remend side by side with named peers, in one run on one machine."""
