"""What must not be left out: each entry is one change to the source, and the tests of which one must then fail.

    (file, text, what it becomes, tests)

The text stands in the file exactly once. A list for people to add to: whoever adds a safety adds its mutant.
"""

POWER = "tests/torture/test_power.py::test_what_was_saved_is_there"
KILLS = "tests/torture/test_kills.py"
OPERATIONS = "tests/torture/test_operations.py"
SIGNALS = "tests/torture/test_signals.py"
RESUME = "tests/run/test_resume.py"
BETWEEN = "tests/run/test_resume.py::test_killed_between_any_two_steps"
CHECKPOINT = "tests/run/test_checkpoint.py"
DAMAGE = "tests/promises/test_07_damage.py"
HOSTILE = "tests/promises/test_24_hostile.py"
READER = "tests/data/test_reader.py"

MUTANTS = [
    # --- durable: each fsync, and the order ---
    ("run/checkpoint.py", "            digested.write(part)\n        os.fsync(file)", "            digested.write(part)", POWER),
    ("run/checkpoint.py", "    sync_folder(beside)\n", "", POWER),
    ("run/checkpoint.py", "    sync_folder(final.parent)\n", "", POWER),
    ("run/checkpoint.py", "        make_folder(beside)\n", "        beside.mkdir(parents=True)\n", POWER),
    ("run/metrics.py", "        os.fsync(file)\n", "        pass\n", POWER),
    ("run/saving.py", "            first()\n", "", POWER),
    ("data/files.py", "            Digested(file).write(content)\n            os.fsync(file)", "            Digested(file).write(content)", POWER),
    ("data/files.py", "            beside.unlink()\n        raise\n    sync_folder(path.parent)\n\n\ndef put", "            beside.unlink()\n        raise\n\n\ndef put", POWER),
    ("data/files.py", "        os.fsync(descriptor)\n", "        pass\n", POWER),
    ("data/files.py", "            sync_folder(one.parent)\n", "            pass\n", POWER),
    ("run/run.py", "            make_folder(self.path)\n", "            self.path.mkdir(parents=True, exist_ok=True)\n", POWER),
    (
        "run/checkpoint.py",
        "        files = _written(beside, weights, state)\n",
        "        beside.rename(final)\n        beside = final\n        files = _written(beside, weights, state)\n",
        f"{POWER} {OPERATIONS} {KILLS} {CHECKPOINT}",
    ),
    (
        "run/saving.py",
        "            save_checkpoint(self.folder, weights, tree, step, val_loss)\n",
        "            prune(self.folder, lambda found: set())\n"
        "            save_checkpoint(self.folder, weights, tree, step, val_loss)\n",
        f"{OPERATIONS} {POWER}",
    ),
    ("data/files.py", "        beside.replace(path)\n    except", "        path.write_bytes(content)\n    except", f"{POWER} {OPERATIONS}"),
    # --- sound: digests, seals, names ---
    ("run/checkpoint.py", '!= digest:\n', "!= digest and False:\n", f"{CHECKPOINT} {RESUME}"),
    ("run/checkpoint.py", "    verify(checkpoint)\n", "", f"{CHECKPOINT} {RESUME}"),
    ("run/checkpoint.py", "content != sealed(body) or ", "", f"{CHECKPOINT} {DAMAGE}"),
    ("run/checkpoint.py", '        if manifest["name"] != path.name or manifest["step"] != step:\n', "        if False:\n", f"{CHECKPOINT} {HOSTILE}"),
    ("run/checkpoint.py", '    for left in folder.glob(".step-*.part"):\n', "    for left in ():\n", f"{CHECKPOINT} {OPERATIONS}"),
    ("run/run.py", "            damaged.append(problem)\n", "            raise UsageError(problem)\n", RESUME),
    # --- exact: every part of the state ---
    ("loop/state.py", '        restore_random_state(saved["random"])\n', "", f"{BETWEEN} {KILLS}"),
    ("data/generators.py", '        "python": state_of(random),\n', '        "python": state_of(random.Random(1)),\n', f"{READER} {KILLS}"),
    ("data/generators.py", '        "numpy": state_of(np.random),\n', '        "numpy": state_of(np.random.RandomState(1)),\n', f"{READER} {KILLS}"),
    ("data/generators.py", '        "torch": torch.get_rng_state(),\n        "cuda"', '        "torch": torch.Generator().get_state(),\n        "cuda"', f"{BETWEEN} {KILLS}"),
    ("loop/state.py", "        self.reading_on, self.updating = copied(saved[\"data\"]), False", "        self.updating = False", BETWEEN),
    ("loop/state.py", '        self.told = Clock(**saved["told"]) if saved["told"] else None\n', "", RESUME),
    ("loop/state.py", '            optimizer.load_state_dict(copied({**state, "param_groups": groups}))\n', "            pass\n", BETWEEN),
    ("loop/state.py", '            scheduler.load_state_dict(copied(state))\n', "            pass\n", BETWEEN),
    ("loop/state.py", '        self.epoch_loss.load_state_dict(saved["epoch_loss"])\n', "", BETWEEN),
    ("loop/state.py", '        self.logged_loss.load_state_dict(saved["logged_loss"])\n', "", BETWEEN),
    ("loop/state.py", '        self.average.load_state_dict(saved["average"])\n', "        pass\n", BETWEEN),
    ("loop/state.py", '        self.plateau = Plateau(**copied(saved["plateau"]))\n', "", BETWEEN),
    ("loop/state.py", 'to_device(copied(saved["carry"]), device)', "None", BETWEEN),
    ("loop/state.py", '        self.last = copied(saved["last"])\n', "", f"{BETWEEN} {RESUME}"),
    ("loop/state.py", '{**random_state(), **self.before["random"]} if', 'random_state() if', RESUME),
    ("loop/train.py", "            if reader.draws:\n                state.before_drawing()\n", "", RESUME),
    ("run/run.py", "            left = cut_rows(self.metrics, self.position)\n", "            left = self.position\n", f"{BETWEEN} {KILLS}"),
    ("run/run.py", "            self.position, self.best = position\n", "            self.position = position[0]\n", f"{BETWEEN} {KILLS} {RESUME}"),
    ("data/reader.py", '            self.seed = self.start["seed"]\n', "            pass\n", READER),
    ("data/reader.py", '                restore(generator, self.start["generators"][name])\n', "                pass\n", READER),
    # --- one at a time, and in time ---
    ("run/running.py", "            if not _locked_soon(file):\n                file.close()\n                return None\n", "", RESUME),
    ("run/saving.py", "            self.thread.join()\n", "", f"{RESUME} {KILLS}"),
    ("interrupts.py", "        raise _end(_pending)\n", "        pass\n", f"{RESUME} {SIGNALS}"),
    ("loop/evaluate.py", "poll()", "None", f"{RESUME} {SIGNALS}"),
]  # fmt: skip
