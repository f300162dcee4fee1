"""`python -m jobs.train_workers`, whose workers do not see the job's folders: as on other nodes."""

import jobs.train_workers

jobs.train_workers.MARK = "nothing-that-workers-look-for"  # theirs is another process's

if __name__ == "__main__":
    jobs.train_workers.main()
