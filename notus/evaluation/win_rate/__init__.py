"""Win rate of one model over another by a judge that sees every pair in both orders: `--suite win-rate`."""
