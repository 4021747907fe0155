//! Ranks over TCP on loopback: the same results as threads, and what happens when a process does not come, differs,
//! dies or stalls.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use trencadis::parallel::launch::Launch;
use trencadis::parallel::tcp::{Identity, Timeouts, connect, host, join};
use trencadis::parallel::{Group, run_ranks};
use trencadis::{Error, Result};

use crate::linear::run as layer;
use crate::whole::{Whole, kinds};

const MINUTE: Duration = Duration::from_secs(60);
const LONG: Timeouts = Timeouts { gather: MINUTE, silence: MINUTE };

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A process as it joins.
#[derive(Clone)]
struct Joining {
    rank: usize,
    size: usize,
    identity: Identity,
}

fn joining(size: usize) -> Vec<Joining> {
    (0..size).map(|rank| Joining { rank, size, identity: Identity::new("a recipe") }).collect()
}

/// What each of these returns from `f`, each on a thread with a connection of its own.
fn over_tcp<T: Send>(
    ranks: Vec<Joining>,
    timeouts: Timeouts,
    f: impl Fn(&Group) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let (listener, port) = listener();
    let mut listener = Some(listener);
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|Joining { rank, size, identity }| {
                let (f, listener) = (&f, listener.take_if(|_| rank == 0));
                scope.spawn(move || {
                    let group = match listener {
                        Some(listener) => host(listener, size, &identity, timeouts),
                        None => join(("127.0.0.1", port), rank, size, &identity, timeouts),
                    };
                    group.and_then(|group| group.run(f))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn texts<T>(results: Vec<Result<T>>) -> Vec<String> {
    results
        .into_iter()
        .map(|result| result.map_or_else(|error| error.to_string(), |_| "well".into()))
        .collect()
}

#[test]
fn results_are_those_of_threads_bit_for_bit() {
    let whole = Arc::new(Whole::new(24, 48, 72));
    let all = |group: &Group, whole: &Whole| -> Result<Vec<[Vec<f32>; 4]>> {
        let layers = kinds().map(|kind| layer(group, whole, kind, false));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let mut sum = layers[0][0].clone();
        group.all_reduce(&mut sum)?;
        let pair = group.subgroup("pair", &[group.rank() / 2 * 2, group.rank() / 2 * 2 + 1])?;
        pair.broadcast(&mut sum, 1)?;
        group.barrier()?;
        Ok(layers.into_iter().chain([[sum, vec![], vec![], vec![]]]).collect())
    };
    let operands = whole.clone();
    let threads = run_ranks(4, move |group| all(group, &operands)).unwrap();
    let processes = over_tcp(joining(4), LONG, |group| Ok((all(group, &whole)?, group.sent())));
    for (rank, (process, thread)) in processes.into_iter().zip(threads).enumerate() {
        let (process, sent) = process.unwrap();
        assert_eq!(process, thread, "rank {rank}");
        assert!(sent[rank] == 0 && sent[(rank + 1) % 4] > 0);
    }
}

/// More than any buffer of the system holds goes both ways at once: posting waits for nobody.
#[test]
fn large_messages_cross() {
    let len = 4 << 20;
    let results = over_tcp(joining(2), LONG, |group| {
        let other = 1 - group.rank();
        group.post(other, &vec![group.rank() as f32 + 1.0; len])?;
        let mut got = vec![0f32; len];
        group.receive(other, &mut got)?;
        Ok(got.iter().all(|&x| x == other as f32 + 1.0))
    });
    assert!(results.into_iter().all(|result| result.unwrap()));
}

#[test]
fn one_process_alone_needs_no_others() {
    let launch = Launch { rank: 0, world: 1, local_rank: 0, address: "nowhere.invalid".into(), port: 1 };
    let group = connect(&launch, &Identity::new(""), LONG).unwrap();
    let mut x = [3.0];
    group.all_reduce(&mut x).unwrap();
    assert_eq!((x, group.size()), ([3.0], 1));
}

/// As `torchrun` would start them: all through `connect`.
#[test]
fn a_launch_connects() {
    // A port that was free a moment ago.
    let (free, port) = listener();
    drop(free);
    let sums: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|rank| {
                scope.spawn(move || {
                    let launch =
                        Launch { rank, world: 3, local_rank: rank, address: "localhost".into(), port };
                    let group = connect(&launch, &Identity::new("x"), LONG)?;
                    let mut sum = [rank];
                    group.all_reduce(&mut sum)?;
                    Ok::<_, Error>(sum[0])
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
    });
    assert_eq!(sums, [3; 3]);
}

/// Every rank of `ranks` refuses with `message`.
#[track_caller]
fn refused(ranks: Vec<Joining>, timeouts: Timeouts, message: &str) {
    for result in over_tcp(ranks, timeouts, |_| Ok(())) {
        assert!(matches!(&result, Err(Error::Usage(text)) if text == message), "{result:?}");
    }
}

#[test]
fn ranks_that_differ_are_refused_on_every_rank_with_one_message() {
    let mut ranks = joining(3);
    ranks[2].identity.recipe = "0123".into();
    let mine = Identity::new("a recipe").recipe;
    let message = format!("recipes differ: rank 0 has {mine}, rank 2 has 0123; start all ranks alike");
    refused(ranks, LONG, &message);

    let mut ranks = joining(3);
    ranks[1].identity.code = "0.0.7".into();
    let mine = Identity::new("").code;
    let message =
        format!("versions of trencadis differ: rank 0 has {mine}, rank 1 has 0.0.7; start all ranks alike");
    refused(ranks, LONG, &message);

    let mut ranks = joining(3);
    ranks[2].size = 4;
    refused(ranks, LONG, "numbers of ranks differ: rank 0 has 3, rank 2 has 4; start all ranks alike");

    let mut ranks = joining(3);
    ranks[2].rank = 1;
    refused(ranks, LONG, "rank 1 has come twice; every process needs a rank of its own");

    let mut ranks = joining(3);
    ranks[1].rank = 7;
    refused(ranks, LONG, "rank 7 has come, but there are 3 ranks, counted from 0");
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let timeout = Timeouts { gather: Duration::from_millis(300), ..LONG };
    let mut ranks = joining(3);
    ranks.remove(1);
    refused(ranks, timeout, "rank 1 of 3 has not come within 300ms; start all ranks");

    let (gone, port) = listener();
    drop(gone);
    let alone = join(("127.0.0.1", port), 1, 2, &Identity::new(""), timeout).unwrap_err().to_string();
    assert!(alone.starts_with(&format!("rank 0 is not at 127.0.0.1:{port} within 300ms: ")), "{alone}");

    let (taken, port) = listener();
    let launch = Launch { rank: 0, world: 2, local_rank: 0, address: "127.0.0.1".into(), port };
    let error = connect(&launch, &Identity::new(""), timeout).unwrap_err().to_string();
    assert!(error.contains("set MASTER_PORT to a free port"), "{error}");
    drop(taken);
}

#[test]
fn strangers_at_the_port_are_passed_over() {
    let (listener, port) = listener();
    let mut silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut loud = TcpStream::connect(("127.0.0.1", port)).unwrap();
    loud.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let identity = Identity::new("");
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| join(("127.0.0.1", port), 1, 2, &identity, LONG)?.barrier());
        host(listener, 2, &identity, LONG).unwrap().barrier().unwrap();
        other.join().unwrap().unwrap();
    });
    assert!(begin.elapsed() < Duration::from_secs(4), "the silent one has kept ranks waiting");
    silent.write_all(b"x").unwrap();
}

#[test]
fn a_rank_that_fails_or_panics_ends_all_with_one_message() {
    let begin = Instant::now();
    let results = over_tcp(joining(3), LONG, |group| match group.rank() {
        1 => Err(Error::failure("no more disk")),
        _ => group.barrier(),
    });
    let message = "rank 1 failed: no more disk";
    assert_eq!(texts(results), [message, "no more disk", message]);

    let results = over_tcp(joining(3), LONG, |group| {
        assert_ne!(group.rank(), 1, "planted");
        group.barrier()
    });
    let results = texts(results);
    assert!(results[0].starts_with("rank 1 panicked: "), "{results:?}");
    assert!(results.iter().all(|text| *text == results[0]), "{results:?}");

    let results =
        over_tcp(joining(3), LONG, |group| if group.rank() == 1 { Ok(()) } else { group.barrier() });
    let message = "rank 1 has ended while others still wait for its messages";
    assert_eq!(texts(results), [message, "well", message]);

    // A refusal that ranks have agreed on stays one.
    let results =
        over_tcp(joining(3), LONG, |group| group.check_same("seeds", ["1", "1", "2"][group.rank()]));
    let message = "seeds differ: rank 0 has 1, rank 2 has 2; start all ranks alike";
    assert!(results.iter().all(|result| matches!(result, Err(Error::Usage(text)) if text == message)));
    assert!(begin.elapsed() < MINUTE / 2, "nobody waited for the timeout");
}

/// Not a test of its own: what [`Process`] runs. It is rank 1 of 3, joins, and then lives until its input ends.
#[test]
fn rank_process() {
    let Ok(port) = std::env::var("TRENCADIS_TEST_PORT") else { return };
    let group = join(("127.0.0.1", port.parse().unwrap()), 1, 3, &Identity::new("a recipe"), LONG).unwrap();
    group.barrier().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0);
}

/// Rank 1 of 3 as a process.
struct Process(Child);

impl Process {
    fn new(port: u16) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tcp::rank_process", "--nocapture"])
            .env("TRENCADIS_TEST_PORT", port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What ranks 0 and 2 return from waiting in a chain for the process, to which `harm` is done meanwhile.
fn with_process(silence: Duration, harm: impl FnOnce(&mut Process)) -> [String; 2] {
    let (listener, port) = listener();
    let mut process = Process::new(port);
    let (ready, wait) = std::sync::mpsc::channel();
    let body = |group: Result<Group>| -> String {
        let group = group.unwrap();
        group.barrier().unwrap();
        ready.clone().send(()).unwrap();
        // Rank 2 waits for 0, and 0 for the process.
        let from = if group.rank() == 2 { 0 } else { 1 };
        group.receive(from, &mut [0f32]).unwrap_err().to_string()
    };
    let identity = Identity::new("a recipe");
    // Gathering takes as long as the process needs to start.
    let timeouts = Timeouts { silence, ..LONG };
    std::thread::scope(|scope| {
        let body = &body;
        let identity = &identity;
        let zero = scope.spawn(move || body(host(listener, 3, identity, timeouts)));
        let two = scope.spawn(move || body(join(("127.0.0.1", port), 2, 3, identity, timeouts)));
        (0..2).for_each(|_| wait.recv().unwrap());
        harm(&mut process);
        [zero, two].map(|rank| rank.join().unwrap())
    })
}

#[test]
fn a_process_that_dies_is_noticed_at_once() {
    let begin = Instant::now();
    let errors = with_process(MINUTE, |process| process.0.kill().unwrap());
    assert_eq!(errors, ["rank 1 has died: its connection is closed"; 2]);
    assert!(begin.elapsed() < MINUTE / 2);
}

#[test]
fn a_process_that_stalls_is_named() {
    let errors = with_process(Duration::from_secs(1), |_| {});
    assert_eq!(errors, ["rank 1 has been silent for 1s: it runs, but others wait for its messages"; 2]);
}

#[cfg(unix)]
#[test]
fn a_process_that_is_stopped_is_named() {
    let errors = with_process(Duration::from_secs(1), |process| {
        let stopped = Command::new("kill").args(["-STOP", &process.0.id().to_string()]).status();
        assert!(stopped.unwrap().success());
    });
    assert_eq!(errors, ["rank 1 has been silent for 1s: it does not answer"; 2]);
}
