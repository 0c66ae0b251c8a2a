"""Keys of dishonest issuers: p is prime and 1 modulo 65537, so that x -> x^65537 is no permutation modulo p q.

They are constants because a search for them takes minutes. `test_permutation` tests that they are what is said here.
"""

P_512 = int(
    "f32dee3159175a7f693377f7d3283ca29f10e99f5f22c4c6961d7fee413fdff84bbf4a132ad95f05e969a8533421c25b"
    "0c3e50953c78eb8ce5f5f8a74572124d",
    16,
)
Q_512 = int(
    "e844858cec996f97b358664a2d994ae91fb1f3a09fe99da79e2c67355cd36b871322d3ece9dd95d014950332efc29e72"
    "8a2880c259a95b5b0cab545fdd5dfd67",
    16,
)

P_1536 = int(
    "f404f03785743a2ef534ccedd0248121a42dd21a578c77d7cf1ce7ef2ac8d6e62e36818067f47f9125495eee64ba508e"
    "da8bd5e633394d3b609f7c1098504e3b8999a867826b7942137f20700274b529669b2f9b213abe38587a0e3f430135c9"
    "33da9b5190403efa7cc0c97d2ff3bd4435a1d502f073439f0635bcd6c19c580cc2f5a66ec9743d453da74df36fcd12e3"
    "9ea8d0c084a2893dd4898d4760e707698e64523e0c5180bb462d81a61990a96e0d4e8ac8ff7d9be44d7b90b83c9963ad",
    16,
)
Q_1536 = int(
    "ce4e1f6f3f47d14b4941d48e0641da92df2463e3ff912296e32a237d976eab97035da6ce87dbdefc619edfc66e7b85eb"
    "b45a9f1388c46678c4a326df8563bb6fb02d9ed613df7b4fd04ebe9efb2c4ea989c21c295e586039e3d6fa222122c827"
    "8f37c0d5dbb2d54e757570882f69e70854a5e95c810858ece7c19cb4ad74501671fb7481e5147d7365cb71d171a84378"
    "1fe231336c7dba458297a8c78b974a7e657936c8a54ecb742243e18c6c34ba643424d7554441bf0b4a2fb5f4e906e6e1",
    16,
)

# The encoding of this message is an e-th power modulo P_512. One message in 65,537 is; a counter found it.
MESSAGE = b"message 70252"
