"""What the result files say.

tables.py        README's table and REPORT.md
pictures.py      speed, memory, roofline and scaling as SVG
explanations.py  why fastloss loses a row
"""
