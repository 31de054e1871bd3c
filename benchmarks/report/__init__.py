"""What the result files say.

pages.py             what stands in README.md and REPORT.md
tables.py            times and memory, lost rows
accuracy.py          errors, and where another is more exact
explanations.py      why fastloss loses a row
verdict.py           what `fastloss bench` prints
look.py              how the pictures look
pictures.py          speed, memory and roofline as SVG
scaling_picture.py   time over size
accuracy_picture.py  the largest errors
"""
