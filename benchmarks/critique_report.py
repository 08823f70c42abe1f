"""stub"""
def draw(r,p): pass
def table(r):
    for s in r["seeds"]:
        print(s["seed"], "start", s["start"]["win_rate"], s["start"]["by_task"], "ratings", s["ratings"]["win_rate"], s["ratings"]["by_task"], s["ratings"]["reward_accuracy"])
        for run,h in zip(s["overall_score"], s["head_to_head"]): print(run["fault_rate"], run["win_rate"], run["by_task"], run["reward_accuracy"], h)
    return ""
