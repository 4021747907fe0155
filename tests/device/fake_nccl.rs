//! Collectives over NCCL, by one that ranks have which are threads of one process (`fake_libnccl.c`), each with a GPU of
//! a driver that runs nothing: what NCCL is asked for, and what is said where it will not do.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use half::bf16;

use trencadis::device::{Device, DeviceChoice, select, select_for_rank};
use trencadis::parallel::device::{DeviceTransport, Exchange};
use trencadis::parallel::ring::Direction;
use trencadis::parallel::{DeviceGroup, Group, Ranks};
use trencadis::{Error, Result};

use crate::fake::{Fake, INSIDE, library};

/// What the process with the fakes is to be told.
const EXPECT: &str = "TRENCADIS_TEST_EXPECT";

/// The fake driver with four GPUs, and beside it an NCCL under the name that packages give it.
fn fake() -> Fake {
    let fake = Fake::new();
    library("fake_libnccl.c", &fake.path().join("libnccl.so.2"));
    fake
}

/// Runs the ignored test `name` with this; the log of NCCL.
fn runs(fake: &Fake, name: &str, settings: &[(&str, &str)]) -> Vec<String> {
    let path: PathBuf = fake.path().join("nccl.log");
    let _ = fs::remove_file(&path);
    let log = path.to_str().unwrap();
    let all = [settings, &[("FAKE_CUDA_DEVICES", "4"), ("FAKE_NCCL_LOG", log)]].concat();
    fake.runs_test(&format!("fake_nccl::{name}"), &all);
    fs::read_to_string(&path).unwrap_or_default().lines().map(String::from).collect()
}

fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs `f` on ranks with a GPU each, and fails where one waits for longer than the test may take.
fn on_gpus<T: Send + 'static>(
    ranks: usize,
    timeout: Duration,
    f: impl Fn(&Group, &DeviceGroup, &Device) -> Result<T> + Send + Sync + 'static,
) -> Result<Vec<T>> {
    let begin = Instant::now();
    let results = Ranks::new(ranks).timeout(timeout).run(move |host| {
        let device = Device::cuda(host.rank())?;
        let group = DeviceGroup::over(host, &device, DeviceTransport::Nccl)?;
        f(host, &group, &device)
    });
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    results
}

const LONG: Duration = Duration::from_secs(60);

fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((rank * 37 + i * 11) as f32 * 0.7).sin()).collect()
}

#[test]
fn nccl_is_asked_for_what_the_host_would_do() {
    let log = runs(&fake(), "collectives", &[]);
    let count = |part: &str| log.iter().filter(|line| line.contains(part)).count();
    // One identifier for each group, told to all of its ranks.
    assert_eq!((count("id of ring"), count("joins ring 1"), count("joins ring 4")), (4, 1, 4), "{log:#?}");
    assert_eq!((count("joins"), count("leaves"), count("aborts")), (10, 10, 0), "{log:#?}");
    // A group of one asks for nothing.
    for (line, times) in [
        ("does all-gather: 20 of type 1 on", 9),
        ("does reduce-scatter: 5 of type 7 on", 9),
        ("does reduce-scatter: 3 of type 9 on", 9),
        ("does all-reduce: 7 of type 7 on", 9),
        ("does broadcast: 28 of type 1 on", 9),
        ("does exchange: 4 of type 1 on", 9),
        ("captures all-reduce: 7 of type 7 on", 9),
        ("captures exchange: 2 of type 1 on", 9),
    ] {
        assert_eq!(count(line), times, "{line}: {log:#?}");
    }
}

#[test]
#[ignore = "for a process that has the fakes: nccl_is_asked_for_what_the_host_would_do"]
fn collectives() {
    if inside() {
        for ranks in 1..=4 {
            on_gpus(ranks, LONG, against_the_host).unwrap();
        }
    }
}

fn against_the_host(host: &Group, group: &DeviceGroup, device: &Device) -> Result<()> {
    let (rank, size, stream) = (host.rank(), host.size(), device.stream()?);
    assert_eq!(group.transport(), DeviceTransport::Nccl);
    let twin = host.subgroup("twin", &(0..size).collect::<Vec<_>>())?;

    let mut all = vec![0.0; 5 * size];
    twin.all_gather(&mut all, &values(rank, 5))?;
    let all_device = device.zeros::<f32>(5 * size)?;
    group.all_gather(&stream, &all_device, &device.upload(&values(rank, 5))?)?;
    group.synchronize(&stream)?;
    assert_eq!(all_device.download()?, all);

    let mut mine = vec![0.0; 5];
    twin.reduce_scatter(&mut mine, &all)?;
    let mine_device = all_device.view::<f32>(20 * rank..20 * (rank + 1))?;
    group.reduce_scatter(&stream, &mine_device, &all_device)?;
    group.synchronize(&stream)?;
    assert_eq!(mine_device.download()?, mine);

    let mut reduced = values(rank, 7);
    twin.all_reduce(&mut reduced)?;
    let reduced_device = device.upload(&values(rank, 7))?;
    group.all_reduce(&stream, &reduced_device)?;
    group.synchronize(&stream)?;
    assert_eq!(reduced_device.download()?, reduced);

    let mut sent = values(rank, 7);
    twin.broadcast(&mut sent, size - 1)?;
    let sent_device = device.upload(&values(rank, 7))?;
    group.broadcast(&stream, &sent_device, size - 1)?;
    group.synchronize(&stream)?;
    assert_eq!(sent_device.download()?, sent);
    assert_eq!(group.sent(), twin.sent());

    let narrow = |rank: usize| values(rank, 3 * size).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let (sum, part) = (device.zeros::<bf16>(3)?, device.upload(&narrow(rank))?);
    group.reduce_scatter(&stream, &sum, &part)?;
    group.synchronize(&stream)?;
    let mut want = narrow(0)[3 * rank..][..3].to_vec();
    for other in 1..size {
        want.iter_mut().zip(&narrow(other)[3 * rank..]).for_each(|(sum, &x)| *sum += x);
    }
    assert_eq!(sum.download()?, want);

    // Both directions at once; of two ranks both go to the other one.
    let before = group.sent();
    let send = [0.0f32, 100.0].map(|offset| device.upload(&[rank as f32 + offset; 6]).unwrap());
    let receive = [0; 2].map(|_| device.zeros::<f32>(6).unwrap());
    let exchange = |i: usize, direction| Exchange { direction, send: &send[i], receive: &receive[i] };
    group.exchange(&stream, &[exchange(0, Direction::Right), exchange(1, Direction::Left)])?;
    group.synchronize(&stream)?;
    let [left, right] = [(rank + size - 1) % size, (rank + 1) % size];
    assert_eq!(receive[0].download()?, [left as f32; 6]);
    assert_eq!(receive[1].download()?, [right as f32 + 100.0; 6]);
    let mut bytes = vec![0; size];
    [left, right].iter().filter(|&&to| to != rank).for_each(|&to| bytes[to] += 24);
    assert_eq!(group.sent().iter().zip(&before).map(|(a, b)| a - b).collect::<Vec<_>>(), bytes);

    // Nothing of the host happens in a replay, so everything can be captured.
    host.barrier()?;
    stream.begin_capture()?;
    group.all_reduce(&stream, &reduced_device)?;
    group.exchange(&stream, &[exchange(0, Direction::Right)])?;
    let graph = stream.end_capture()?;
    host.barrier()?;
    graph.launch(&stream)?;
    drop(graph);
    group.synchronize(&stream)
}

#[test]
fn what_nccl_will_not_do_is_one_sentence_on_every_rank() {
    let fake = fake();
    let says = |settings: &[(&str, &str)], text: &str| {
        runs(&fake, "refusal", &[settings, &[(EXPECT, text)]].concat())
    };
    const INSTALL: &str = "install NCCL 2.18 or newer, or set TRENCADIS_NCCL to the path of its library";
    says(
        &[("FAKE_NCCL_VERSION", "2708")],
        &format!("rank 0: libnccl.so.2 is NCCL 2.7.8, which is too old; {INSTALL}"),
    );
    let log = says(
        &[("FAKE_CUDA_ONE_GPU", "1")],
        "ranks 0 and 1 are on one GPU (GPU-01010101-0101-0101-0101-010101010101), and NCCL takes one rank a GPU; start \
         at most as many ranks on a machine as it has GPUs, or run them as threads of one process that share one device",
    );
    assert!(log.is_empty(), "NCCL was not asked: {log:#?}");
    let failed = "unhandled system error (2); the last words";
    says(&[("FAKE_NCCL_FAIL", "id")], &format!("rank 0: NCCL cannot make an identifier: {failed}"));
    // The others are waiting for rank 1 within NCCL.
    says(
        &[("FAKE_NCCL_FAIL", "init")],
        &format!("rank 1 cannot be connected: NCCL cannot connect the ranks: {failed}"),
    );

    // One that has none of the functions, under the second name; then none at all; then named ones.
    let nccl = fake.path().join("libnccl.so.2");
    let [elsewhere, other] = ["elsewhere.so", "libnccl.so"].map(|name| fake.path().join(name));
    fs::rename(&nccl, &elsewhere).unwrap();
    fs::copy(fake.path().join("libcuda.so"), &other).unwrap();
    says(
        &[],
        &format!("rank 0: libnccl.so is no NCCL of 2.18 or newer: it has no ncclGetVersion; {INSTALL}"),
    );
    fs::remove_file(other).unwrap();
    says(&[], &format!("rank 0: NCCL was not found (libnccl.so.2 cannot be opened); {INSTALL}"));
    says(
        &[("TRENCADIS_NCCL", "/absent/libnccl.so.2")],
        "rank 0: TRENCADIS_NCCL is \"/absent/libnccl.so.2\", which",
    );
    runs(&fake, "collectives", &[("TRENCADIS_NCCL", elsewhere.to_str().unwrap())]);
}

#[test]
#[ignore = "for a process that has the fakes: what_nccl_will_not_do_is_one_sentence_on_every_rank"]
fn refusal() {
    if inside() {
        let error = on_gpus(3, LONG, |_, _, _| Ok(())).unwrap_err().to_string();
        let expected = std::env::var(EXPECT).unwrap();
        assert!(error.starts_with(&expected), "{error}");
    }
}

/// How a rank can go missing, each with what all ranks then say.
const MISSING: [(&str, &str); 5] = [
    ("failed", "rank 1: NCCL cannot queue an all-reduce: unhandled cuda error (1); the last words"),
    ("broken", "rank 1: NCCL cannot go on: remote process exited or there was a network error (6)"),
    ("dead", "rank 1 panicked: a bug"),
    ("given up", "rank 1 failed: the disk is full"),
    ("stalled", "rank 0 has waited for NCCL for 1s: a rank has stalled, or its program differs"),
];

#[test]
fn a_rank_that_goes_missing_ends_all() {
    let fake = fake();
    for (how, text) in MISSING {
        let mut settings = vec![(EXPECT, text), ("TRENCADIS_TEST_HOW", how)];
        match how {
            "failed" => settings.push(("FAKE_NCCL_FAIL", "all-reduce")),
            "broken" => settings.push(("FAKE_NCCL_BREAK", "all-reduce")),
            _ => {}
        }
        let log = runs(&fake, "missing", &settings);
        // Whoever was waiting on rank 1 was ended, or would be still.
        for rank in [0, 2] {
            let aborted = format!("rank {rank} aborts ring 1");
            assert_eq!(log.iter().filter(|line| **line == aborted).count(), 1, "{how}: {log:#?}");
        }
        // A rank that had nothing under way may leave as ever.
        assert!(
            !log.iter().any(|line| line.contains("leaves") && !line.starts_with("rank 1")),
            "{how}: {log:#?}"
        );
    }
}

#[test]
#[ignore = "for a process that has the fakes: a_rank_that_goes_missing_ends_all"]
fn missing() {
    if !inside() {
        return;
    }
    let how = std::env::var("TRENCADIS_TEST_HOW").unwrap();
    let timeout = if how == "stalled" { Duration::from_secs(1) } else { LONG };
    let error = on_gpus(3, timeout, move |host, group, device| {
        let (stream, data) = (device.stream()?, device.upload(&[1.0f32])?);
        match (host.rank(), how.as_str()) {
            (1, "dead") => panic!("a bug"),
            (1, "given up") => return Err(Error::failure("the disk is full")),
            (1, "stalled") => {
                // It never comes; the others are ended without it, and then so is it.
                while group.check().is_ok() {
                    std::thread::sleep(Duration::from_millis(10));
                }
                return group.check();
            }
            _ => {}
        }
        // Rank 2 comes later, so that the first who has waited too long is rank 0.
        if host.rank() == 2 && how == "stalled" {
            std::thread::sleep(Duration::from_millis(300));
        }
        group.all_reduce(&stream, &data)?;
        group.synchronize(&stream)
    });
    assert_eq!(error.unwrap_err().to_string(), std::env::var(EXPECT).unwrap());
    // The communicators are aborted by threads of their own.
    let log = std::env::var("FAKE_NCCL_LOG").unwrap();
    let aborted =
        || (0..3).filter(|rank| fs::read_to_string(&log).unwrap().contains(&format!("rank {rank} aborts")));
    let deadline = Instant::now() + Duration::from_secs(10);
    while aborted().filter(|rank| *rank != 1).count() < 2 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn ranks_of_a_machine_take_gpu_after_gpu() {
    let log = Fake::new().runs_test("fake_nccl::choice", &[("FAKE_CUDA_DEVICES", "3")]);
    let opened: Vec<&str> = log.iter().filter_map(|line| line.strip_prefix("retain ")).collect();
    assert_eq!(opened, ["0", "1", "2", "0", "1", "0"], "{log:#?}");
}

#[test]
#[ignore = "for a process that has the fake driver: ranks_of_a_machine_take_gpu_after_gpu"]
fn choice() {
    if inside() {
        for (local, gpu) in [0, 1, 2, 0, 1].into_iter().enumerate() {
            let selected = select_for_rank(DeviceChoice::Cuda, local).unwrap();
            assert_eq!(selected.description, format!("Fake GPU {gpu}, 16.0 GiB"));
            assert_eq!(selected.device.unwrap().uuid().unwrap(), Some([gpu + 1; 16]));
        }
        assert_eq!(select(DeviceChoice::Auto).unwrap().description, "Fake GPU 0, 16.0 GiB");
    }
}
