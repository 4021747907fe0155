use std::process::ExitCode;

fn main() -> ExitCode {
    trencadis::cli::main()
}
