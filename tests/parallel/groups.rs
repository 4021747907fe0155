//! Groups of threads: collectives, meshes, and ranks that fail.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use trencadis::parallel::collectives::part_of;
use trencadis::parallel::{Mesh, MeshGroups, Ranks, Simulation, run_ranks};
use trencadis::{Error, Result};

const SIZES: [usize; 5] = [1, 2, 3, 4, 8];

/// Numbers whose sum depends on the order in which it is taken.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((rank * 37 + i * 11) as f32 * 0.7).sin() * 10f32.powi(rank as i32 - 3)).collect()
}

fn sums(size: usize, len: usize) -> Vec<f32> {
    let mut sum = values(0, len);
    for rank in 1..size {
        sum.iter_mut().zip(values(rank, len)).for_each(|(sum, x)| *sum += x);
    }
    sum
}

#[test]
fn collectives_have_their_results_and_volumes() {
    for size in SIZES {
        let results = run_ranks(size, move |group| {
            let (rank, k) = (group.rank(), group.size() as u64);
            let mut volumes = Vec::new();
            let mut volume = || {
                let before: u64 = volumes.iter().sum();
                volumes.push(group.sent().iter().sum::<u64>() - before);
            };
            let mut all = vec![0.0; 5 * size];
            group.all_gather(&mut all, &values(rank, 5))?;
            volume();
            let mut mine = vec![0.0; 5];
            group.reduce_scatter(&mut mine, &values(rank, 5 * size))?;
            volume();
            // A length that the ranks cannot share evenly.
            let len = 5 * size + 2;
            let mut reduced = values(rank, len);
            group.all_reduce(&mut reduced)?;
            volume();
            let root = size - 1;
            let mut sent = values(rank, 7);
            group.broadcast(&mut sent, root)?;
            volume();
            group.barrier()?;
            volume();

            let part = part_of(len, size, rank).len() as u64;
            let expected = [
                (k - 1) * 20,
                (k - 1) * 20,
                4 * (len as u64 - part) + 4 * (k - 1) * part,
                if rank == root { (k - 1) * 28 } else { 0 },
                0,
            ];
            assert_eq!(volumes, expected);
            Ok((all, mine, reduced, sent))
        });
        for (rank, (all, mine, reduced, sent)) in results.unwrap().into_iter().enumerate() {
            assert_eq!(all, (0..size).flat_map(|rank| values(rank, 5)).collect::<Vec<_>>());
            // Bit for bit: the order of the sum is that of the ranks.
            assert_eq!(mine, sums(size, 5 * size)[5 * rank..][..5]);
            assert_eq!(reduced, sums(size, 5 * size + 2));
            assert_eq!(sent, values(size - 1, 7));
        }
    }
}

#[test]
fn parts_cover_every_length_once() {
    for (len, parts) in [(0, 3), (2, 3), (7, 3), (9, 3), (10, 4)] {
        let all: Vec<usize> = (0..parts).flat_map(|part| part_of(len, parts, part)).collect();
        assert_eq!(all, (0..len).collect::<Vec<_>>());
    }
}

#[test]
fn groups_of_a_mesh_do_not_mix() {
    let mesh = Mesh::new(6, 3).unwrap();
    assert_eq!((mesh.data(), mesh.tensor(), mesh.coordinates(4)), (2, 3, (1, 1)));
    assert_eq!((mesh.data_ranks(4), mesh.tensor_ranks(4)), (vec![1, 4], vec![3, 4, 5]));
    let results = run_ranks(6, move |world| {
        let groups = MeshGroups::new(world, mesh)?;
        let me = world.rank() as f64;
        // Posted over three groups before anything is taken, to a rank that two of them share.
        let twin = world.subgroup("twin", &mesh.tensor_ranks(world.rank()))?;
        let next = (groups.tensor.rank() + 1) % 3;
        let last = (groups.tensor.rank() + 2) % 3;
        groups.tensor.post(next, &[me])?;
        twin.post(next, &[me + 100.0])?;
        let (mut a, mut b) = ([0.0], [0.0]);
        twin.receive(last, &mut b)?;
        groups.tensor.receive(last, &mut a)?;
        assert_eq!(b[0] - a[0], 100.0);
        let (mut data, mut tensor) = ([me], [me]);
        groups.data.all_reduce(&mut data)?;
        groups.tensor.all_reduce(&mut tensor)?;
        assert_eq!(groups.data.world_rank(groups.data.rank()), world.rank());
        Ok((data[0], tensor[0]))
    });
    let expected: Vec<(f64, f64)> =
        (0..6).map(|rank| (3.0 + 2.0 * (rank % 3) as f64, if rank < 3 { 3.0 } else { 12.0 })).collect();
    assert_eq!(results.unwrap(), expected);
}

/// That `result` is a usage error, and its text.
#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(Error::Usage(message)) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_mesh_is_refused() {
    assert_eq!(
        refusal(Mesh::new(8, 3)),
        "8 ranks are no mesh with a tensor axis of 3; it must divide their number"
    );
    assert!(Mesh::new(8, 0).is_err() && Mesh::new(0, 1).is_err());
    assert_eq!(refusal(Mesh::of(8, 3, 2)), "a mesh of 3 x 2 (data x tensor) does not match 8 ranks");
    assert_eq!(Mesh::of(8, 4, 2).unwrap(), Mesh::new(8, 2).unwrap());
    assert_eq!(
        refusal(Mesh::new(8, 4).unwrap().check_divides(&[("heads", 6), ("width", 64), ("tokens", 130)])),
        "heads 6, tokens 130 cannot be shared evenly by 4 ranks; choose a tensor axis that divides them"
    );
    let mesh = Mesh::new(4, 2).unwrap();
    assert_eq!(
        refusal(run_ranks(2, move |world| MeshGroups::new(world, mesh).map(drop))),
        "a mesh of 2 x 2 (data x tensor) does not match 2 ranks"
    );
    let wrong = |ranks: &'static [usize]| refusal(run_ranks(2, |world| world.subgroup("g", ranks).map(drop)));
    assert!(wrong(&[0, 1, 2]).contains("there are 2 ranks"));
    assert!(wrong(&[0, 1, 0]).contains("a rank is there twice"));
    assert_eq!(refusal(run_ranks(0, |_| Ok(()))), "there must be at least one rank");
}

#[test]
fn one_rank_refuses_for_all_and_values_are_compared() {
    let ranks = run_ranks(3, |group| {
        let mine = if group.rank() == 0 { Ok(()) } else { Err(Error::usage(format!("no {}", group.rank()))) };
        group.agree(mine)
    });
    assert_eq!(refusal(ranks), "no 1");
    assert!(run_ranks(3, |group| group.agree(Ok(()))).is_ok());
    assert!(run_ranks(3, |group| group.check_same("recipes", "a")).is_ok());
    let ranks = run_ranks(3, |group| group.check_same("recipes", ["a", "a", "bc"][group.rank()]));
    assert_eq!(refusal(ranks), "recipes differ: rank 0 has a, rank 2 has bc; start all ranks alike");
}

/// What every rank returns and what the run does, where `f` is run by four ranks with this timeout.
fn failing(
    timeout: Duration,
    f: impl Fn(&trencadis::parallel::Group) -> Result<()> + Send + Sync + 'static,
) -> (Vec<String>, String) {
    let seen = Arc::new(Mutex::new(vec![String::new(); 4]));
    let of_ranks = seen.clone();
    let result = Ranks::new(4).timeout(timeout).run(move |group| {
        let result = f(group);
        let text = result.as_ref().map_or_else(Error::to_string, |()| "well".into());
        of_ranks.lock().unwrap()[group.rank()] = text;
        result
    });
    let seen = seen.lock().unwrap().clone();
    (seen, result.unwrap_err().to_string())
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_rank_that_fails_or_panics_ends_all_with_one_message() {
    let begin = Instant::now();
    let (ranks, run) = failing(LONG, |group| {
        if group.rank() == 2 {
            return Err(Error::failure("no more disk"));
        }
        group.barrier()
    });
    let message = "rank 2 failed: no more disk";
    assert_eq!(ranks, [message, message, "no more disk", message]);
    assert_eq!(run, message);

    let (ranks, run) = failing(LONG, |group| {
        assert_ne!(group.rank(), 2, "planted");
        group.barrier()
    });
    assert!(run.starts_with("rank 2 panicked: ") && run.contains("planted"), "{run}");
    assert_eq!([&ranks[0], &ranks[1], &ranks[3]], [&run; 3]);

    let (ranks, run) = failing(LONG, |group| if group.rank() == 2 { Ok(()) } else { group.barrier() });
    let message = "rank 2 has ended while others still wait for its messages";
    assert_eq!(ranks, [message, message, "well", message]);
    assert_eq!(run, message);
    assert!(begin.elapsed() < LONG / 2, "nobody waited for the timeout");
}

#[test]
fn a_rank_that_stalls_is_named_though_others_wait_in_a_chain() {
    let (wake, sleep) = mpsc::channel::<()>();
    let sleep = Mutex::new(sleep);
    let begin = Instant::now();
    let timeout = Duration::from_millis(200);
    let (ranks, run) = failing(timeout, move |group| {
        let (rank, mut x) = (group.rank(), [0.0]);
        if rank == 3 {
            // Ends when the test does.
            let _ = sleep.lock().unwrap().recv();
            return Ok(());
        }
        // 0 waits for 1, 1 for 2, and 2 for the one that does nothing.
        group.receive::<f32>(rank + 1, &mut x)
    });
    let message = "rank 3 has been silent for 200ms: it runs, but others wait for its messages";
    assert_eq!(ranks, [message, message, message, ""]);
    assert_eq!(run, message);
    assert!(begin.elapsed() < Duration::from_secs(20));
    drop(wake);
}

#[test]
fn ranks_that_wait_for_one_another_are_named() {
    let (ranks, run) = failing(Duration::from_millis(100), |group| {
        let mut x = [0.0];
        group.receive::<f32>((group.rank() + 1) % 4, &mut x)
    });
    assert!(run.ends_with("have waited for one another for 100ms"), "{run}");
    assert!(ranks.iter().all(|rank| *rank == run), "{ranks:?}");
}

#[test]
fn messages_of_another_size_are_refused() {
    let (ranks, run) = failing(LONG, |group| match group.rank() {
        0 => group.post(1, &[1f32]).and_then(|()| group.barrier()),
        1 => group.receive(0, &mut [0f32; 2]),
        _ => group.barrier(),
    });
    assert_eq!(run, "rank 0 has sent 4 bytes where rank 1 expects 8: their programs or recipes differ");
    assert!(ranks.iter().all(|rank| *rank == run), "{ranks:?}");
}

/// One message of 1000 bytes on a link of 100 bytes a second with 1 s of latency; the second waits for the first.
#[test]
fn simulated_time_counts_links_and_products() {
    let simulation = Simulation { latency: 1.0, bandwidth: 100.0, flops: 1.0 };
    let clocks = Ranks::new(2).simulated(simulation).run(|group| {
        if group.rank() == 0 {
            group.post(1, &[0u8; 1000])?;
            group.post(1, &[0u8; 500])?;
            assert_eq!(group.clock(), Some(0.0));
            Ok(vec![])
        } else {
            let mut times = Vec::new();
            for len in [1000, 500] {
                group.receive(0, &mut vec![0u8; len])?;
                times.push(group.clock().unwrap());
            }
            Ok(times)
        }
    });
    assert_eq!(clocks.unwrap()[1], [11.0, 16.0]);
    assert_eq!(run_ranks(1, |group| Ok(group.clock())).unwrap(), [None]);
}
