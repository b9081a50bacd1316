"""`remend plan`: what a training step costs on accelerators that are not here.

The step is compiled for a named TPU slice on any machine (``topology``), its program is read back
(``hlo``), and the counts are set against the chip's figures (``chips``, ``roofline``). Beside what
was compiled stands what the formulas say (``flops``, ``memory``), so that either checks the other.
"""
