//! What other streams have queued goes on beside a launch.

use trencadis::Result;
use trencadis::device::emulator::{CopyPolicy, EmulatorOptions};
use trencadis::device::{Buffer, Device, Launch, Stream};

use crate::{Params, everywhere};

const POISON: u32 = u32::MAX;

/// What a planted kernel takes, on a device of its own.
struct Machine {
    device: Device,
    stream: Stream,
    /// Where the kernel reads and writes, and where it does not.
    a: Buffer<u32>,
    c: Buffer<u32>,
    beside: Buffer<u32>,
    word: Buffer<i32>,
}

fn values() -> Vec<u32> {
    (0..64).map(|i| 100 + i).collect()
}

impl Machine {
    fn new(options: EmulatorOptions, a: &[u32], beside: &[u32]) -> Self {
        let device = Device::emulator(options);
        Self {
            stream: device.stream().unwrap(),
            a: device.upload(a).unwrap(),
            c: device.alloc(64).unwrap(),
            beside: device.upload(beside).unwrap(),
            word: device.zeros(1).unwrap(),
            device,
        }
    }

    fn launch(&self, kernel: &str) -> Result<()> {
        let params = Params {
            a: self.a.ptr().address(),
            b: self.word.ptr().address(),
            c: self.c.ptr().address(),
            ..Params::default()
        };
        let launch = Launch::new([1, 1, 1], 64, 0);
        // SAFETY: the parameters are the kernel's, the buffers live as long.
        unsafe { self.device.kernels().launch(kernel, launch, self.stream.raw(), &params) }
    }
}

/// What the kernel copies of what is copied, and told of, beside it. `first`: it is told of before.
fn brought(kernel: &str, options: EmulatorOptions, first: bool) -> Vec<u32> {
    let machine = Machine::new(options, &[POISON; 64], &values());
    let other = machine.device.stream().unwrap();
    if first {
        other.write_value32(&machine.word, 0, 1).unwrap();
    }
    machine.a.copy_from(&other, &machine.beside).unwrap();
    if !first {
        other.write_value32(&machine.word, 0, 1).unwrap();
    }
    machine.launch(kernel).unwrap();
    machine.c.download().unwrap()
}

#[test]
fn what_is_waited_for_is_there() {
    for options in everywhere() {
        let told = format!("{options:?}");
        assert_eq!(brought("planted_copy_when_ready", options, false), values(), "{told}");
    }
}

#[test]
fn what_is_not_waited_for_is_late() {
    let late = EmulatorOptions { policy: CopyPolicy::AtWait, ..EmulatorOptions::default() };
    let early = EmulatorOptions { policy: CopyPolicy::AtIssue, ..EmulatorOptions::default() };
    let random = |seed| EmulatorOptions { seed, policy: CopyPolicy::Random, ..EmulatorOptions::default() };
    let no_wait = "planted_copy_when_ready_no_wait";
    assert_eq!(brought(no_wait, late.clone(), false), [POISON; 64]);
    assert_eq!(brought(no_wait, early.clone(), false), values());
    // The flag tells of what is to be copied.
    let kernel = "planted_copy_when_ready";
    assert_eq!(brought(kernel, late, true), [POISON; 64]);
    assert_eq!(brought(kernel, early, true), values());
    assert!((0..20).any(|seed| brought(kernel, random(seed), true) != values()));
    assert!((0..20).any(|seed| brought(kernel, random(seed), true) == values()));
}

/// What is copied beside the kernel as soon as both of its warps have counted.
fn taken(kernel: &str, options: EmulatorOptions) -> Vec<u32> {
    let machine = Machine::new(options, &values(), &[POISON; 64]);
    let other = machine.device.stream().unwrap();
    other.wait_value32(&machine.word, 0, 2).unwrap();
    machine.beside.copy_from(&other, &machine.c).unwrap();
    machine.launch(kernel).unwrap();
    assert_eq!(machine.c.download().unwrap(), values());
    machine.beside.download().unwrap()
}

#[test]
fn what_is_counted_has_been_written() {
    for options in everywhere() {
        let told = format!("{options:?}");
        assert_eq!(taken("planted_count_what_is_written", options), values(), "{told}");
    }
    // Counted before, it is not there where somebody looks at once.
    let at_once = |seed| EmulatorOptions { seed, policy: CopyPolicy::AtIssue, ..EmulatorOptions::default() };
    assert!((0..6).all(|seed| taken("planted_count_what_is_written_early", at_once(seed)) != values()));
}

#[test]
fn a_flag_that_never_comes_is_named() {
    for options in everywhere() {
        let machine = Machine::new(options, &values(), &values());
        let other = machine.device.stream().unwrap();
        other.wait_value32(&machine.word, 0, 7).unwrap();
        other.write_value32(&machine.word, 0, 1).unwrap();
        let told = machine.launch("planted_copy_when_ready").unwrap_err().to_string();
        for part in [
            "deadlock: no thread can go on",
            "lanes 00000001 look at the same value again and again (tests/kernels/planted.cu:",
            "byte 0 of an allocation of 4 bytes of global memory, which is 0",
            "to be at least 7, and it is 0",
        ] {
            assert!(told.contains(part), "{told}");
        }
    }
}

/// A launch waits for what its own stream has queued, and for the streams that this waits for.
#[test]
fn streams_go_on_in_their_order() {
    for options in everywhere() {
        let machine = Machine::new(options, &[POISON; 64], &values());
        let other = machine.device.stream().unwrap();
        machine.a.copy_from(&other, &machine.beside).unwrap();
        machine.stream.wait(&other.record().unwrap()).unwrap();
        machine.stream.write_value32(&machine.word, 0, 1).unwrap();
        machine.launch("planted_copy_when_ready_no_wait").unwrap();
        assert_eq!(machine.c.download().unwrap(), values());
        assert_eq!(machine.word.download().unwrap(), [1]);
    }
}

/// The branches of a graph run beside each other each time.
#[test]
fn graphs_have_branches() {
    for options in everywhere() {
        let machine = Machine::new(options, &[POISON; 64], &values());
        let (stream, other) = (&machine.stream, machine.device.stream().unwrap());
        let nothing = machine.device.upload(&[POISON; 64]).unwrap();
        stream.begin_capture().unwrap();
        machine.a.copy_from(stream, &nothing).unwrap();
        other.wait(&stream.record().unwrap()).unwrap();
        machine.a.copy_from(&other, &machine.beside).unwrap();
        other.write_value32(&machine.word, 0, 1).unwrap();
        machine.launch("planted_copy_when_ready").unwrap();
        stream.wait(&other.record().unwrap()).unwrap();
        stream.write_value32(&machine.word, 0, 0).unwrap();
        let told = other.end_capture().err().unwrap().to_string();
        assert!(told.contains("begun on another stream"), "{told}");
        let graph = stream.end_capture().unwrap();
        assert_eq!(machine.word.download().unwrap(), [0]);
        for round in 0..3 {
            let next: Vec<u32> = values().iter().map(|x| x + 1000 * round).collect();
            machine.beside.write(stream, &next).unwrap();
            machine.c.copy_from(stream, &nothing).unwrap();
            graph.launch(stream).unwrap();
            assert_eq!(machine.c.download().unwrap(), next);
            assert_eq!(machine.word.download().unwrap(), [0]);
        }
    }
}

#[test]
fn a_wait_that_nobody_ends_is_told() {
    let device = Device::emulator(EmulatorOptions::default());
    let (words, stream) = (device.zeros::<i32>(2).unwrap(), device.stream().unwrap());
    stream.wait_value32(&words, 1, 3).unwrap();
    let told = stream.synchronize().unwrap_err().to_string();
    assert!(
        told.contains("to be at least 3, and it is 0; nothing that was queued before changes that"),
        "{told}"
    );
    // Another stream still can.
    let other = device.stream().unwrap();
    other.write_value32(&words, 1, 3).unwrap();
    stream.synchronize().unwrap();
    // Memory may go while somebody waits for it.
    stream.wait_value32(&words, 0, 1).unwrap();
    drop(words);
    stream.synchronize().unwrap();
}
