"""MT-Bench: two-turn answers, a judge's scores from 1 to 10 for each turn, all in FastChat's files."""
