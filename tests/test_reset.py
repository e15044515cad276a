"""Reset: Mailroom taken back out of the account. What it says before, and that it deletes no
message. What undo has too is in test_undo.py; that it asks first, in test_commands.py."""

import homes
import test_undo
from books import PHONE
from homes import EmbeddedHome, embedded_home, once, run, snapshot
from jmap_server import JSON, Fault
from radicale_server import RadicaleServer
from test_undo import APPLY, SENDERS, on_jmap

# Where messages of someone unknown lie; they are in the Screener afterwards, if not elsewhere.
WAITING = ["Screener", "Screener/@ToFeed", "@ToFeed", "Feed/@ToScreener", "Screener/@MailroomError"]
WAITING += ["@MailroomError", "@MailroomWarning/Mine", "Feed/Trash", "Imbox/Feed/Inbox"]
AFTER = {boxes: {"Screener"} for boxes in WAITING}
AFTER |= {"@MailroomWarning/Mine": {"Mine"}, "Feed/Trash": {"Trash"}}
AFTER |= {homes.mail_of(sender, nth): {"Screener"} for sender in SENDERS for nth in (0, 1)}


def furnish(home: EmbeddedHome) -> None:
    """Three senders in groups, of which one is the user's, and messages under every label."""
    home.book.add_group("Imbox")
    test_undo.furnish(home)
    for boxes in WAITING:
        home.move(home.deliver("Zoe <zoe@z.example>", boxes), *boxes.split("/"))


def test_a_reset_takes_all_that_is_mailrooms_and_nothing_else(home: EmbeddedHome) -> None:
    furnish(home)
    full, cards = snapshot(home), home.book.seen()
    ran = run(home, "reset")
    assert (ran.status, ran.err) == (0, "")
    assert snapshot(home) == full, "it has changed something"
    lines = ['group "Feed"', 'group "Mailroom"', 'contact "Bob Smith"']
    lines = ['empty the group "Imbox"', *(f"delete the {line}" for line in lines)]
    assert sorted(line for line in ran.out.splitlines() if " the " in line[:11]) == sorted(lines)
    assert 'empty "Feed", messages: ' in ran.out
    assert "Nothing has been changed" in ran.out
    ran = run(home, *APPLY)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.endswith("Mailroom is out of the account.\n")
    assert home.where() == AFTER
    methods = [write.method for write in home.mail.writes]
    assert methods[-1] == "Email/set", "messages to come would still be routed"
    gone, emptied = {"Bob Smith", "Feed", "Mailroom"}, {"members": frozenset[str]()}
    assert home.book.seen() == {
        uid: card._replace(**emptied) if card.name == "Imbox" else card
        for uid, card in cards.items()
        if card.name not in gone
    }
    assert {PHONE} in [card.phones for card in home.book.seen().values()]
    assert run(home, *APPLY).out == "There is nothing to do.\n"


@on_jmap
def test_what_is_refused_is_told_and_the_rest_is_done(home: EmbeddedHome) -> None:
    furnish(home)
    mail = next(iter(home.account.mails_in("Feed")))
    refuse: dict[str, JSON] = {mail: {"type": "forbidden"}}
    refuse[home.account.group_id("Imbox")] = {"type": "overQuota"}
    home.mail.faults = [Fault(when, refuse=refuse) for when in ("Email/set", "ContactCard/set")]
    ran = run(home, *APPLY)
    assert ran.status == 1
    assert f"{mail}: forbidden\n" in ran.out
    assert '"Imbox": overQuota\n' in ran.out
    assert ran.out.endswith("Not all could be done. Next: python mailroom.py reset --apply\n")
    assert [boxes for boxes in home.where().values() if "Feed" in boxes] != []
    assert run(home, *APPLY).status == 0
    assert home.where() == AFTER
    assert {card.name for card in home.book.seen().values()} == {"Tea", "Eve", "Friends", "Imbox"}


def test_many_messages_and_contacts() -> None:
    with embedded_home("cyrus", RadicaleServer) as home:
        home.mail.options.limits |= {"maxObjectsInGet": 500, "maxObjectsInSet": 50}
        home.mail.options.max_query_limit = 500
        assert run(home, "setup", "--apply").status == 0
        for n in range(100):
            home.tap(home.deliver(f"s{n}@x.example", f"mail {n}"), "@ToFeed")
        once(home)
        for n in range(2000):
            home.account.deliver(f"s{n % 50}@x.example", ["Feed"])
        ran = run(home, *APPLY)
        assert (ran.status, 'empty "Feed", messages: 2,100' in ran.out) == (0, True)
        assert home.account.cards == {}
        assert len(home.account.mails_in("Screener")) == 2100
        assert not home.account.mails_in("Feed")
