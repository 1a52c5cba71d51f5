"""What is fast and what is not, measured beside a rival in one run. Each prints ratios and writes JSON."""
