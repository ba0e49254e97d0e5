"""stub"""
from fivestep.learn.explain_facts import Explanation
def page(facts: Explanation) -> str:
    return ""
