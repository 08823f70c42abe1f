"""AlpacaEval (Li et al. 2023, github.com/tatsu-lab/alpaca_eval): outputs, their judging by the package, and scores."""
