"""The report of a run or of several: what their directories hold, as charts and one page. Trains and loads nothing."""
