"""From statistics to verdicts: the rule, operating points, early decisions, reasons in words."""
