//! Frames on a connection between two ranks.

use std::io::{self, Read, Write};

use super::super::transport::Fault;

/// What one rank tells another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A message of a channel.
    Data { channel: u64, bytes: Vec<u8> },
    /// The ranks have ended.
    Fault(Fault),
    /// This rank has done its work and sends nothing more.
    Goodbye,
    /// For whom does the receiver wait?
    Ask,
    /// For this rank, or for nobody.
    Answer(Option<usize>),
}

const DATA: u8 = 0;
const FAILURE: u8 = 1;
const USAGE: u8 = 2;
const GOODBYE: u8 = 3;
const ASK: u8 = 4;
const ANSWER: u8 = 5;
const NOBODY: u64 = u64::MAX;

/// Kind, a number whose meaning depends on it, length of what follows.
pub(super) fn write(out: &mut impl Write, frame: &Frame) -> io::Result<()> {
    let (kind, number, bytes): (u8, u64, &[u8]) = match frame {
        Frame::Data { channel, bytes } => (DATA, *channel, bytes),
        Frame::Fault(fault) => (if fault.usage { USAGE } else { FAILURE }, 0, fault.message.as_bytes()),
        Frame::Goodbye => (GOODBYE, 0, &[]),
        Frame::Ask => (ASK, 0, &[]),
        Frame::Answer(rank) => (ANSWER, rank.map_or(NOBODY, |rank| rank as u64), &[]),
    };
    out.write_all(&[kind])?;
    out.write_all(&number.to_le_bytes())?;
    out.write_all(&(bytes.len() as u64).to_le_bytes())?;
    out.write_all(bytes)
}

/// The next frame.
pub(super) fn read(from: &mut impl Read) -> io::Result<Frame> {
    let mut header = [0; 17];
    from.read_exact(&mut header)?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let (number, len) = (number(1), number(9));
    // Grows with what arrives, so that a damaged length takes no memory.
    let mut bytes = Vec::new();
    if from.take(len).read_to_end(&mut bytes)? as u64 != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let fault = |bytes: Vec<u8>, usage| {
        Frame::Fault(Fault { message: String::from_utf8_lossy(&bytes).into_owned(), usage })
    };
    match header[0] {
        DATA => Ok(Frame::Data { channel: number, bytes }),
        FAILURE => Ok(fault(bytes, false)),
        USAGE => Ok(fault(bytes, true)),
        GOODBYE => Ok(Frame::Goodbye),
        ASK => Ok(Frame::Ask),
        ANSWER => Ok(Frame::Answer((number != NOBODY).then_some(number as usize))),
        kind => Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of unknown kind {kind}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_damage() {
        let frames = [
            Frame::Data { channel: 1 << 63, bytes: vec![1, 2, 3] },
            Frame::Data { channel: 0, bytes: vec![] },
            Frame::Fault(Fault::failure("é")),
            Frame::Fault(Fault::usage("no")),
            Frame::Goodbye,
            Frame::Ask,
            Frame::Answer(Some(7)),
            Frame::Answer(None),
        ];
        let mut stream = Vec::new();
        frames.iter().for_each(|frame| write(&mut stream, frame).unwrap());
        let mut rest = &stream[..];
        for frame in &frames {
            assert_eq!(read(&mut rest).unwrap(), *frame);
        }
        assert!(rest.is_empty());
        for cut in 0..20 {
            assert_eq!(read(&mut &stream[..cut]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{cut}");
        }
        assert!(read(&mut &[9; 17][..]).is_err());
    }
}
