from run_fixtures import (  # noqa: F401
    color_images,
    command,
    digits,
    empty_study,
    images,
    late_ctrl_c,
    no_curves,
    quick_studies,
    recipe,
    settings,
    trained,
    without_locks,
)
