from gesso.errors import GessoError, Interrupted, nearest


def test_an_error_is_one_line_with_place_and_remedy():
    error = GessoError("the file breaks\n off", where="a.json", remedy="Download it again.")
    assert str(error) == "a.json: the file breaks off. Download it again."
    assert error.exit_code == 2 and Interrupted("x").exit_code == 130


def test_nearest_names_what_was_meant():
    assert nearest("stps", ["steps", "seed", "name"]) == "Did you mean 'steps'?"
    assert nearest("zzz", ["a", "b"]) == "Known: 'a', 'b'."
    assert nearest("zzz", []) == "None is known."
    assert nearest("qqqqq", [f"name{i:02}" for i in range(20)]).endswith("'name07' and more.")
