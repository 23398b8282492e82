"""How good a policy is: win rates, intervals, judges of pairs and held-out figures."""
