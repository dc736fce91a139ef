"""From one run to a decision: groups of runs that differ in something, and what can be concluded from them."""
