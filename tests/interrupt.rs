//! Ctrl-C and SIGTERM, sent to a process of its own.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use trencadis::train::interrupt::{INTERRUPTED, Interrupt};

/// Announces itself, waits for the request, announces that, and waits for the end; not a test of its own.
#[test]
fn child_waits() {
    if std::env::var_os("TRENCADIS_TEST_INTERRUPT").is_none() {
        return;
    }
    let interrupt = Interrupt::install().unwrap();
    assert!(!interrupt.requested());
    let say = |word: &str| {
        println!("{word}");
        std::io::stdout().flush().unwrap();
    };
    say("ready");
    while !interrupt.requested() {
        std::thread::yield_now();
    }
    say("requested");
    // Ends when the parent closes the pipe, with a code that is not 130.
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    std::process::exit(7);
}

/// A child that never outlives its test, whatever fails.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        // It has usually ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start() -> (Guarded, impl FnMut(&str)) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_waits", "--nocapture"])
        .env("TRENCADIS_TEST_INTERRUPT", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let wait_for = move |word: &str| {
        assert!(lines.any(|line| line.unwrap().ends_with(word)), "the child says {word}");
    };
    (Guarded(child), wait_for)
}

fn signal(child: &Child, name: &str) {
    let status =
        Command::new("sh").args(["-c", "kill -s $0 $1", name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn the_first_signal_asks_and_the_second_ends() {
    for name in ["INT", "TERM"] {
        let (mut child, mut wait_for) = start();
        wait_for("ready");
        signal(&child.0, name);
        wait_for("requested");
        // Waiting would close the pipe, and the child would end by itself.
        let _open = child.0.stdin.take();
        signal(&child.0, name);
        assert_eq!(child.0.wait().unwrap().code(), Some(INTERRUPTED), "{name}");
    }
}

#[test]
fn after_one_signal_the_process_ends_as_it_likes() {
    let (mut child, mut wait_for) = start();
    wait_for("ready");
    signal(&child.0, "INT");
    wait_for("requested");
    drop(child.0.stdin.take());
    assert_eq!(child.0.wait().unwrap().code(), Some(7));
}
