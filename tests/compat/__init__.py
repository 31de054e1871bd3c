"""Drop-ins beside the libraries themselves: values, gradients, dtypes, attributes and errors, on drawn calls.

tools.py        a drawn call of both, judged by the one tolerance rule
test_patch.py   swapping and back
test_<library>.py
"""
