RUNS = ()
class Workshop:
    def __init__(self, folder): pass
